"""Real data sets built on the user's machine from ordinary packages."""
