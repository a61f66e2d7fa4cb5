"""The other side: a server for one cascade, written by hand with FastAPI, PyTorch and FAISS.

    python benchmarks/_serve_reference.py --bundle BUNDLE --port PORT [--workers 2]

It knows the features and the three stages, and nothing else: no deadlines, keys, metrics, events, excluded items, swaps
or degradation. Weights and modules are the bundle's, so both sides run the same kernels; the index is read by FAISS;
what is known of users and items lies in tensors, found by a dictionary of user ids. Ages and clocks follow the moment
of the request, which here is the end of the log. A request computes in one of as many threads as there are cores.
"""

import os
from argparse import ArgumentParser
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import anyio.to_thread
import faiss
import numpy as np
import torch
import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from torch import Tensor

from raycascade.batch import Batch
from raycascade.bundle import Bundle, load_bundle

BUNDLE_VARIABLE = "RAYCASCADE_BENCHMARK_BUNDLE"
THREADS = 2  # as many as cores
PATIENCE_S = 300  # a worker that takes longer to load than uvicorn waits would be killed and begun again, for ever
NOTHING: dict[str, Tensor] = {}


class Reference:
    """The cascade of a bundle, called by hand for one user at a time; safe to call from several threads."""

    def __init__(self, uri: str) -> None:
        bundle = load_bundle(uri)
        models = bundle.cascade.models
        self.retriever, self.pre_ranker, self.ranker = models["retriever"], models["pre_ranker"], models["ranker"]
        self.keeps = bundle.cascade.keeps
        self.index = faiss.read_index(f"{bundle.uri}/index/index.faiss")
        self.index_rows_N = np.load(f"{bundle.uri}/index/rows.npy")
        self.item_ids_N = np.concatenate([[0, 0], bundle.items.keys.to_numpy()])
        self.item_fields = {name: _as_rows(values) for name, values in bundle.items.static.items()}
        self.born_ms_N = torch.from_numpy(bundle.items.source_ms["item_age"])
        self.event_fields = bundle.state.space.history_fields
        self.now_ms = bundle.state.as_of_ms
        self._read_users(bundle)

    def _read_users(self, bundle: Bundle) -> None:
        users, length = bundle.users.table, bundle.state.space.history_len
        self.places = {user: place for place, user in enumerate(users["user_key"].to_pylist())}
        names = ("user_id", "age_group", "gender", "region")
        self.user_fields = {name: torch.tensor(users[name].to_numpy().astype(np.int64)) for name in names}

        def newest(column: str) -> Tensor:
            padded = np.zeros((len(users), length), np.int64)
            for place, values in enumerate(users[column].to_pylist()):
                kept = values[-length:]
                padded[place, :len(kept)] = kept
            return torch.from_numpy(padded)

        self.history_UL, self.acted_ms_UL = newest("history"), newest("history_time_ms")
        self.action_UL = newest("history_action")

    @torch.inference_mode()
    def answer(self, user: int) -> list[tuple[int, float]]:
        """Items and scores, best first; KeyError for a user that nobody knows."""
        request = self._request(self.places[user])
        users_QD = self.retriever.embed_users(request).numpy()  # type: ignore[operator]
        found_QK = self.index.search(users_QD, self.keeps[0])[1]
        rows_C = torch.from_numpy(self.index_rows_N[found_QK[0]])
        fields = {name: values[rows_C][None] for name, values in self.item_fields.items()}
        fields["item_age"] = _age(self.now_ms - self.born_ms_N[rows_C])[None]
        _, best_K = self.pre_ranker(_over(request, rows_C, fields))[0, :, 0].topk(self.keeps[1])
        rows_C, fields = rows_C[best_K], {name: values[:, best_K] for name, values in fields.items()}
        scores_K, best_K = self.ranker(_over(request, rows_C, fields))[0, :, 0].topk(self.keeps[2])
        return list(zip(self.item_ids_N[rows_C[best_K].numpy()].tolist(), scores_K.tolist(), strict=True))

    def _request(self, place: int) -> Batch:
        days, hours = self.now_ms // 86_400_000, self.now_ms // 3_600_000
        user = {name: values[place:place + 1] for name, values in self.user_fields.items()}
        user |= {"hour": torch.tensor([hours % 24 + 2]), "weekday": torch.tensor([(days + 3) % 7 + 2])}
        rows_QL = self.history_UL[place:place + 1]
        mask_QL = rows_QL > 0
        history = {name: self.item_fields[name][rows_QL] for name in self.event_fields}
        history["action"] = self.action_UL[place:place + 1]
        history["event_age"] = torch.where(mask_QL, _age(self.now_ms - self.acted_ms_UL[place:place + 1]), 0)
        return Batch(user=user, item=NOTHING, history=history, history_mask_QL=mask_QL, history_rows_QL=rows_QL,
                     candidates_QC=rows_QL[:, :0], mask_QC=mask_QL[:, :0], time_ms_Q=torch.tensor([self.now_ms]))


def _as_rows(values: np.ndarray) -> Tensor:
    tensor = torch.from_numpy(values)
    return tensor.long() if tensor.dtype == torch.int32 else tensor


def _age(age_ms: Tensor) -> Tensor:
    """Embedding rows of ages: by powers of two of a second."""
    return (age_ms.double() / 1000 + 1).log2().floor().clamp(max=31).long() + 2


def _over(request: Batch, rows_C: Tensor, fields: Mapping[str, Tensor]) -> Batch:
    """The request over candidates."""
    return Batch(user=request.user, item=fields, history=request.history, history_mask_QL=request.history_mask_QL,
                 history_rows_QL=request.history_rows_QL, candidates_QC=rows_C[None],
                 mask_QC=torch.ones(1, len(rows_C), dtype=torch.bool), time_ms_Q=request.time_ms_Q)


# ---------------------------------------------------------------- HTTP
class Question(BaseModel):
    """What a caller asks."""

    user_id: int


def app() -> FastAPI:
    """The application over the bundle that the environment names."""
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    cascade = Reference(os.environ[BUNDLE_VARIABLE])

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        anyio.to_thread.current_default_thread_limiter().total_tokens = THREADS
        yield

    api = FastAPI(lifespan=lifespan)

    @api.post("/v1/recommend")
    def recommend(question: Question) -> JSONResponse:
        try:
            found = cascade.answer(question.user_id)
        except KeyError:
            raise HTTPException(404, "no such user") from None
        return JSONResponse({"user_id": question.user_id,
                             "items": [{"item_id": item, "score": score} for item, score in found]})

    return api


def main() -> None:
    parser = ArgumentParser(description="A cascade served by hand.")
    parser.add_argument("--bundle", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    os.environ[BUNDLE_VARIABLE] = options.bundle
    uvicorn.run("_serve_reference:app", factory=True, host="127.0.0.1", port=options.port, workers=options.workers,
                access_log=False, log_level="warning", timeout_worker_healthcheck=PATIENCE_S,
                app_dir=os.path.dirname(os.path.abspath(__file__)))


if __name__ == "__main__":
    main()
