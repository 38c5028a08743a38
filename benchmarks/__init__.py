"""Speed and memory of errata, as ratios over a plain serial version measured in the same run."""
