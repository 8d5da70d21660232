{{/*
Names. A Service is a DNS label that begins with a letter (63 characters), and a StatefulSet has at most 52 characters,
because Kubernetes appends a hash to it in a label. So the full name has at most 20 characters, the slug of a model at
most 21, and "-scheduler-" between them 11. Whatever does not fit or is no DNS label keeps its uniqueness by a hash.
*/}}

{{- /* trivium.slug: a DNS label for any text; arguments: list of the text and the length that is left for it */}}
{{- define "trivium.slug" -}}
{{- $text := index . 0 -}}
{{- $length := index . 1 -}}
{{- $slug := regexReplaceAll "[^a-z0-9]+" (lower $text) "-" | trimAll "-" -}}
{{- if or (ne $slug $text) (gt (len $slug) $length) -}}
{{- $slug = printf "%s-%s" ($slug | trunc (sub $length 9 | int) | trimSuffix "-") (sha256sum $text | trunc 8) | trimPrefix "-" -}}
{{- end -}}
{{- $slug -}}
{{- end -}}

{{- define "trivium.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- define "trivium.fullname" -}}
{{- $name := include "trivium.name" . -}}
{{- $full := .Release.Name -}}
{{- if .Values.fullnameOverride -}}
{{- $full = .Values.fullnameOverride -}}
{{- else if not (contains $name .Release.Name) -}}
{{- $full = printf "%s-%s" .Release.Name $name -}}
{{- end -}}
{{- if regexMatch "^[0-9]" $full -}}
{{- $full = printf "t-%s" $full -}}
{{- end -}}
{{- include "trivium.slug" (list $full 20) -}}
{{- end -}}

{{- /* trivium.modelName: name of a model's workload; arguments: list of the root, the component, the model */}}
{{- define "trivium.modelName" -}}
{{- $root := index . 0 -}}
{{- $model := index . 2 -}}
{{- printf "%s-%s-%s" (include "trivium.fullname" $root) (index . 1) (include "trivium.slug" (list $model.name 21)) -}}
{{- end -}}

{{- /* trivium.requireUniqueModels: fails when a name is given twice, which a schema cannot say */}}
{{- define "trivium.requireUniqueModels" -}}
{{- $seen := dict -}}
{{- range .Values.models -}}
{{- if hasKey $seen .name -}}
{{- fail (printf "models: the name %q is given twice" .name) -}}
{{- end -}}
{{- $_ := set $seen .name true -}}
{{- end -}}
{{- end -}}

{{- define "trivium.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "trivium.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "trivium.image" -}}
{{- $image := .Values.image -}}
{{- $repository := $image.repository -}}
{{- if $image.registry -}}
{{- $repository = printf "%s/%s" $image.registry $repository -}}
{{- end -}}
{{- if $image.digest -}}
{{- printf "%s@%s" $repository $image.digest -}}
{{- else -}}
{{- printf "%s:%s" $repository (default .Chart.AppVersion $image.tag) -}}
{{- end -}}
{{- end -}}

{{- /* Labels of a workload; arguments: list of the root, the component and, if it has one, the model */}}
{{- define "trivium.selectorLabels" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ include "trivium.name" $root }}
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- if gt (len .) 2 }}
trivium/model: {{ include "trivium.slug" (list (index . 2).name 21) | quote }}
{{- end }}
{{- end -}}

{{- define "trivium.labels" -}}
{{- $root := index . 0 -}}
{{ include "trivium.selectorLabels" . }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" }}
{{- with $root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- /* Addresses of the gRPC services, as the other services are told them */}}
{{- define "trivium.tokenizerAddress" -}}
{{- include "trivium.fullname" . }}-tokenizer:50051
{{- end -}}

{{- define "trivium.schedulerAddress" -}}
{{- include "trivium.modelName" (list (index . 0) "scheduler" (index . 1)) }}:50052
{{- end -}}

{{- define "trivium.executorAddress" -}}
{{- include "trivium.modelName" (list (index . 0) "executor" (index . 1)) }}:50053
{{- end -}}

{{- /* trivium.modelArgument: NAME=SOURCE */}}
{{- define "trivium.modelArgument" -}}
{{- printf "%s=%s" .name (default .name .source) -}}
{{- end -}}

{{- /* trivium.podHead: metadata of a pod; arguments as for the labels. It holds no version of the chart: a new chart that
changes nothing in a pod restarts nothing. */}}
{{- define "trivium.podHead" -}}
{{- $root := index . 0 -}}
metadata:
  labels:
    {{- include "trivium.selectorLabels" . | nindent 4 }}
    {{- with $root.Values.commonLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- with $root.Values.podAnnotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end -}}

{{- define "trivium.podCommon" -}}
serviceAccountName: {{ include "trivium.serviceAccountName" . }}
automountServiceAccountToken: false
# A Service called "trivium" would otherwise become TRIVIUM_PORT=tcp://..., which is a flag of ours
enableServiceLinks: false
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  {{- toYaml .Values.podSecurityContext | nindent 2 }}
{{- with .Values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "trivium.containerCommon" -}}
image: {{ include "trivium.image" . | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  {{- toYaml .Values.containerSecurityContext | nindent 2 }}
command: [trivium]
{{- end -}}

{{- /* Probes of a gRPC service; arguments: list of port, service name, service for startup, seconds for startup.
The empty service means "the process lives"; the named one "it can take work". */}}
{{- define "trivium.grpcProbes" -}}
{{- $port := index . 0 -}}
startupProbe:
  grpc: {port: {{ $port }}, service: {{ index . 2 | quote }}}
  periodSeconds: 2
  timeoutSeconds: 2
  failureThreshold: {{ ceil (divf (index . 3) 2) | int }}
livenessProbe:
  grpc: {port: {{ $port }}, service: ""}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 3
readinessProbe:
  grpc: {port: {{ $port }}, service: {{ index . 1 | quote }}}
  periodSeconds: 2
  timeoutSeconds: 2
  failureThreshold: 2
{{- end -}}

{{- /* Environment and volumes of the services that read checkpoints */}}
{{- define "trivium.modelEnv" -}}
- name: HOME
  value: /tmp
- name: HF_HOME
  value: /cache
{{- with .Values.huggingFace.existingSecret }}
- name: HF_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ . }}
      key: {{ $.Values.huggingFace.key }}
{{- end }}
{{- end -}}

{{- define "trivium.modelVolumeMounts" -}}
- {name: tmp, mountPath: /tmp}
- {name: cache, mountPath: /cache}
{{- end -}}

{{- define "trivium.modelVolumes" -}}
- name: tmp
  emptyDir: {}
- name: cache
  {{- if .Values.cache.existingClaim }}
  persistentVolumeClaim:
    claimName: {{ .Values.cache.existingClaim }}
  {{- else if .Values.cache.sizeLimit }}
  emptyDir:
    sizeLimit: {{ .Values.cache.sizeLimit }}
  {{- else }}
  emptyDir: {}
  {{- end }}
{{- end -}}
