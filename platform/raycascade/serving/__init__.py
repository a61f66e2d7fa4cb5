"""Answering requests: the door for raw requests, the stages and the gateway; plain classes that flows/ runs on Ray."""
