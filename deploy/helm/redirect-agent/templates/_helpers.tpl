{{- define "redirect-agent.labels" -}}
app.kubernetes.io/name: redirect-agent
app.kubernetes.io/part-of: istio
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
{{- end }}

{{- define "redirect-agent.image" -}}
{{- if contains "/" .Values.image -}}
{{ .Values.image }}
{{- else -}}
{{- $hub := .Values.hub | default .Values.global.hub -}}
{{ required "hub: set it to the registry that has the image, or set image to a full name with a slash" $hub }}/
{{- .Values.image }}:{{ .Values.tag | default .Values.global.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end }}

{{- define "redirect-agent.config" -}}
{{- with .Values.logging.level | default .Values.global.logging.level -}}
RUST_LOG: {{ . | quote }}
{{ end -}}
EXCLUDE_NAMESPACES: {{ .Values.excludeNamespaces | default (list "kube-system") | join "," | quote }}
AMBIENT_DNS_CAPTURE: {{ .Values.ambient.dnsCapture | quote }}
{{- if not (kindIs "invalid" .Values.ambient.enablementSelectors) }}
AMBIENT_ENABLEMENT_SELECTOR: |
  {{- toYaml .Values.ambient.enablementSelectors | nindent 2 }}
{{- end }}
{{- end }}
