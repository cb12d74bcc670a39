"""Several processes at one merge, and the meshes of their devices."""
