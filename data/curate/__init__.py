"""Makes CoSER data from raw novels with a language model (CoSER paper, sections 3.2 and A.3)."""
