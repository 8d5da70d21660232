"""The scheduler: owner of every request's state. Imports neither torch nor the other services."""
