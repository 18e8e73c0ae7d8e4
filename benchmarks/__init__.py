"""Speed and memory of what this project builds, each against a named peer in the same run."""
