"""What drivers and programs are tested with: the interleaving explorer and its kin."""
