"""The I-quants whose groups are points of a codebook: IQ1_S to IQ3_S."""
