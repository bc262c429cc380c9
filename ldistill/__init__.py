"""ldistill: give a vision-language model its language back by distilling from its own LM."""

__version__ = "0.1.0"
