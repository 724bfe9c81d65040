"""Serve variants behind the OpenAI API: one on its engine itself, several behind a gateway."""
