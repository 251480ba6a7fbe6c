"""Programs that run one model each way, bloomdesk's and others', and print one JSON object: seconds, bytes, tokens."""
