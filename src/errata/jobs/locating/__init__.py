"""Where facts live, and whether that tells where to edit: the jobs of `errata locate`."""
