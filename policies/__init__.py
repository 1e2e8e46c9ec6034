"""What a policy is, how it is packed, named, released, recorded and judged: the contract between the halves."""
