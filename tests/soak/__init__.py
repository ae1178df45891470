"""Everything that must never happen, tried for as long as one likes: `make soak`."""
