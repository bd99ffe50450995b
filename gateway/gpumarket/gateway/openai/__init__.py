"""OpenAI's API: what each endpoint takes, as tables; what it answers; and the document that says so."""
