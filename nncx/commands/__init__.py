"""What each command of `nncx` does, behind the options that `nncx.cli` reads; nothing to import."""
