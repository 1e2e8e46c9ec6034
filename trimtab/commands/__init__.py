"""The commands of `trimtab`, by the half of the loop they belong to."""
