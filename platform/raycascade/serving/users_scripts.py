"""The Lua scripts of the users in Redis: each reads or changes one user at once; `users_redis.py` explains the keys.

An event begins with its time, which is all that a script reads of it; ids are never parsed, because numbers in Lua are
floats.
"""

import hashlib
from typing import NamedTuple


class Script(NamedTuple):
    """A Lua script and what the server knows it by."""

    text: str
    sha: str

    @classmethod
    def of(cls, text: str) -> "Script":
        """The script of a text."""
        return cls(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


# KEYS: user, events, seen. ARGV: 1 to read what was seen.
FETCH = Script.of("""
local user = redis.call('HMGET', KEYS[1], 'features', 'exclude', 'past')
local seen = ARGV[1] == '1' and redis.call('ZRANGE', KEYS[3], 0, -1, 'WITHSCORES') or {}
return {user[1], user[2], user[3], '[' .. table.concat(redis.call('LRANGE', KEYS[2], 0, -1), ',') .. ']',
        '[' .. table.concat(seen, ',') .. ']'}
""")

# KEYS: events, seen, ids. ARGV: history_len, exclude_len, dedup_ms, event ids kept; then for each event: id, time_ms,
# the event and its item as JSON. Returns how many were new.
APPEND = Script.of("""
local function insert(time, event)
  local last = redis.call('LINDEX', KEYS[1], -1)
  if not last or tonumber(string.match(last, '%d+')) <= time then
    redis.call('RPUSH', KEYS[1], event)
    return
  end
  for _, other in ipairs(redis.call('LRANGE', KEYS[1], 0, -1)) do
    if tonumber(string.match(other, '%d+')) > time then
      redis.call('LINSERT', KEYS[1], 'BEFORE', other, event)
      return
    end
  end
end
-- What fails is not undone: keys of a wrong type must show before the id of an event is written.
redis.call('LLEN', KEYS[1])
redis.call('ZCARD', KEYS[2])
local clock, new = redis.call('TIME'), 0
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', now - ARGV[3])
for at = 5, #ARGV, 4 do
  if redis.call('ZADD', KEYS[3], 'NX', now, ARGV[at]) == 1 then
    new = new + 1
    insert(tonumber(ARGV[at + 1]), ARGV[at + 2])
    redis.call('LTRIM', KEYS[1], -ARGV[1], -1)
    if ARGV[2] ~= '0' then
      redis.call('ZADD', KEYS[2], 'LT', ARGV[at + 1], ARGV[at + 3])
      redis.call('ZREMRANGEBYRANK', KEYS[2], 0, -1 - ARGV[2])
    end
  end
end
if new > 0 then
  redis.call('ZREMRANGEBYRANK', KEYS[3], 0, -1 - ARGV[4])
  redis.call('PEXPIRE', KEYS[3], ARGV[3])
end
return new
""")

# KEYS: user. ARGV: at_ms; then the names and values of fields. Returns 1, or 0 where a later state is held.
LOAD = Script.of("""
local held = redis.call('HGET', KEYS[1], 'at_ms')
if held and tonumber(held) > tonumber(ARGV[1]) then return 0 end
redis.call('HSET', KEYS[1], 'at_ms', ARGV[1], unpack(ARGV, 2))
return 1
""")
SCRIPTS = {script.sha: script for script in (FETCH, APPEND, LOAD)}
