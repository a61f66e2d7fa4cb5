"""Answering requests: the door for raw requests, the stages and the gateway as plain classes. flows/ gives them to Ray."""
