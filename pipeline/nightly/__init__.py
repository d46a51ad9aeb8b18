"""All sources of a night, one generation."""
