"""Many runs: comparisons and searches, their options and their results."""
