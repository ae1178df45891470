"""`python -m actvar`: the same as the `actvar` command."""

from actvar.cli import main

main()
