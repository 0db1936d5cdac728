"""Text to tokens: chats, corpora, samples, tokenizer."""
