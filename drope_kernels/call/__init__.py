"""From the arguments of a public call to a backend: options, checks, ops, the choice."""
