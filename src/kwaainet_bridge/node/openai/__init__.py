"""An HTTP endpoint as OpenAI's, whose text the swarms generate."""
