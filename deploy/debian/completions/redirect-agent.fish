# Those of the installed program, whatever its version.
redirect-agent completions fish | source
