"""A software primary MMU that announces what Linux 6.18 announces; README.md names the rooms."""
