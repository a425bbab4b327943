"""The resource EsperTrainingRun: its types, its CRD, its validation. Pure; read v1alpha1 first."""
