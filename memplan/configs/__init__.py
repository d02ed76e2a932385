"""One file a target: a Plan becomes the configuration files of the engine people already use."""
