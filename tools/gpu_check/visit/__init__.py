"""A visit of a GPU that is there for minutes: what is packed for it, its plan, its results."""
