"""Memory and time of a run before it starts. It may import `training` and everything below it."""
