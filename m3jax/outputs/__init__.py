"""What a merge or a conversion leaves: places that appear whole, the manifest, the files beside the weights."""
