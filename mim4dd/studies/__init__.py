"""Many runs: comparisons and searches, what they are told and what they leave."""
