# Those of the installed program, whatever its version.
eval "$(redirect-agent completions bash)"
