"""Recording programs: what a kernel tells of them, put together into one recording."""
