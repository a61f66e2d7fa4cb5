"""Answering requests: the door for raw requests, the stages and the gateway as plain classes; flows/ runs them on Ray."""
