"""Bytes of files, local and remote, as an untrusted network gives them: checked, retried, or an error."""
