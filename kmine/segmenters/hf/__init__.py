"""Promptable models of Hugging Face transformers: SAM, MedSAM, SAM-HQ, SAM 2.1, SAM 3's tracker, EdgeTAM."""
