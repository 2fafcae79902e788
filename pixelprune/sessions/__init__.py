"""Screenshots in time: which blocks of each are kept when its neighbours in the session are known."""

from pixelprune.sessions.codec import CompressedSession, decode_session, encode_session
from pixelprune.sessions.rule import SessionSelection, select_session

__all__ = ["CompressedSession", "SessionSelection", "decode_session", "encode_session", "select_session"]
