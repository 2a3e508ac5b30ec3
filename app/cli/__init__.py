"""The command line: stdout is data, stderr is words, exit codes are an API."""
