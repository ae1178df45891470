"""Run the `actvar` command, by `python -m actvar`."""

from actvar.cli import main

main()
