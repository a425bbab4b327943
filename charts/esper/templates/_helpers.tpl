{{- define "esper.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "esper.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains (include "esper.name" .) .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "esper.name" .) | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "esper.operatorName" -}}
{{ include "esper.fullname" . }}-operator
{{- end -}}

{{- define "esper.valkeyName" -}}
{{ include "esper.fullname" . }}-valkey
{{- end -}}

{{- define "esper.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "esper.operatorName" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- required "serviceAccount.name is required when serviceAccount.create is false" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "esper.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
app.kubernetes.io/name: {{ include "esper.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: esper
{{- end -}}

{{/* Call with (list . "component"). */}}
{{- define "esper.selectorLabels" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ include "esper.name" $root }}
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{/* Call with (list . image-values); the tag defaults to the chart's appVersion. */}}
{{- define "esper.image" -}}
{{- $root := index . 0 -}}
{{- $image := index . 1 -}}
{{- if $image.digest -}}
{{ $image.repository }}@{{ $image.digest }}
{{- else -}}
{{ $image.repository }}:{{ default $root.Chart.AppVersion $image.tag }}
{{- end -}}
{{- end -}}

{{- define "esper.busUrl" -}}
{{- if .Values.redis.external.url -}}
{{- if .Values.valkey.enabled -}}
{{- fail "redis.external.url and valkey.enabled=true exclude each other: set valkey.enabled=false" -}}
{{- end -}}
{{ .Values.redis.external.url }}
{{- else if .Values.valkey.enabled -}}
redis://{{ include "esper.valkeyName" . }}.{{ .Release.Namespace }}.svc:6379/0
{{- end -}}
{{- end -}}

{{- define "esper.busSecretName" -}}
{{- if .Values.redis.external.url -}}
{{ .Values.redis.external.secretName }}
{{- else if .Values.valkey.enabled -}}
{{ default (include "esper.valkeyName" .) .Values.valkey.existingSecret }}
{{- end -}}
{{- end -}}

{{- define "esper.restrictedContainer" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities:
  drop: [ALL]
seccompProfile:
  type: RuntimeDefault
{{- end -}}
