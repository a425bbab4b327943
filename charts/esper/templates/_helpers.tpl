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
{{ ternary "rediss" "redis" .Values.valkey.tls.enabled }}://{{ include "esper.valkeyName" . }}.{{ .Release.Namespace }}.svc:6379/0
{{- end -}}
{{- end -}}

{{- define "esper.busUsername" -}}
{{- if .Values.redis.external.url -}}
{{ .Values.redis.external.username }}
{{- else if .Values.valkey.enabled -}}
operator
{{- end -}}
{{- end -}}

{{/* Secret with ca.crt, tls.crt and tls.key of the built-in Valkey; empty without TLS. */}}
{{- define "esper.valkeyTlsSecretName" -}}
{{- if and .Values.valkey.enabled .Values.valkey.tls.enabled -}}
{{ default (printf "%s-tls" (include "esper.valkeyName" .)) .Values.valkey.tls.existingSecret }}
{{- end -}}
{{- end -}}

{{/* Volume `bus`: the items `password` and, for a server with TLS, `ca.crt`. */}}
{{- define "esper.busVolume" -}}
name: bus
projected:
  sources:
    - secret:
        name: {{ include "esper.busSecretName" . }}
        {{- if .Values.valkey.enabled }}
        items:
          - {key: password, path: password}
        {{- end }}
    {{- with include "esper.valkeyTlsSecretName" . }}
    - secret:
        name: {{ . }}
        items:
          - {key: ca.crt, path: ca.crt}
    {{- end }}
{{- end -}}

{{/* valkey-cli as the operator; the password stays out of the arguments. */}}
{{- define "esper.valkeyCli" -}}
REDISCLI_AUTH="$(cat /etc/valkey-auth/password)" valkey-cli --user operator
{{- if .Values.valkey.tls.enabled }} --tls --cacert /etc/valkey-tls/ca.crt{{ end }}
{{- end -}}

{{- define "esper.valkeyConf" -}}
dir /data
bind * -::*
{{- if .Values.valkey.tls.enabled }}
port 0
tls-port 6379
tls-cert-file /etc/valkey-tls/tls.crt
tls-key-file /etc/valkey-tls/tls.key
tls-ca-cert-file /etc/valkey-tls/ca.crt
tls-auth-clients no
{{- else }}
port 6379
{{- end }}
appendonly yes
appendfsync everysec
maxmemory {{ .Values.valkey.maxMemory }}
maxmemory-policy noeviction
include /run/valkey/users.conf
{{- end -}}

{{/* What the operator may do: esper_leyline.oona.acl.operator_rules, which a test compares. */}}
{{- define "esper.operatorAcl" -}}
+ping +time +select +multi +exec +discard +xadd +xread +xrange +xrevrange +xlen +xdel +xtrim +exists +xinfo|groups +xgroup|create +xreadgroup +xpending +xautoclaim +xack +xinfo|stream +xinfo|consumers +xgroup|delconsumer +publish +subscribe +unsubscribe +set +get +del +expire +pexpire +ttl +hset +hgetall +info
{{- if .Values.redis.perRunUsers }} +acl|setuser +acl|deluser +acl|list +acl|getuser +acl|whoami{{ end }} ~oona.* &oona.*
{{- end -}}

{{/* What the export of run events may do: esper_leyline.oona.acl.nissa_rules, which a test compares. */}}
{{- define "esper.nissaAcl" -}}
+ping +time +select +multi +exec +discard +exists +xinfo|groups +xgroup|create +xreadgroup +xpending +xautoclaim +xack %RW~oona.telemetry %RW~oona.emergency %RW~oona.normal (+set +del %RW~oona.seen.nissa.*) (+xadd %W~oona.deadletter)
{{- end -}}

{{- define "esper.nissaName" -}}
{{ include "esper.fullname" . }}-nissa
{{- end -}}

{{- define "esper.nissaSecretName" -}}
{{- if .Values.valkey.enabled -}}
{{ default (include "esper.nissaName" .) .Values.nissa.existingSecret }}
{{- else -}}
{{ required "nissa.existingSecret is required with a Redis of your own: the password of its user nissa" .Values.nissa.existingSecret }}
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
