"""One decode step: propose a tree, verify it in one forward pass, accept a path, commit it."""
