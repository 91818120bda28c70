"""What container engines have to do with us: container state, spec rewriting, engine configuration."""
