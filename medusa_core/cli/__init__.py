"""The commands of `medusa`."""
