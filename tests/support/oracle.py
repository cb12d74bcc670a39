"""The oracle: every merge again in plain numpy float32, one line per step, independent of m3jax.

No import from m3jax. Its Threefry works on Python's own arithmetic, its coefficients on float64, its thresholds on
numpy's sort, its inner products on Python's integers.
"""

import hashlib
import math

import ml_dtypes
import numpy as np

F32, U32 = np.float32, np.uint32


def flush(x):
    return np.where(np.abs(x) < F32(2.0**-125), np.copysign(F32(0), x), x).astype(F32)


def wide(x):
    return flush(np.asarray(x).astype(F32))


def narrow(x, dtype):
    with np.errstate(over="ignore"):
        return x.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def scalar(value):
    return flush(F32(value))


def adapted(weights, left, right, scale):
    """W + s·L·R: factors divided by powers of two, terms added from the first rank to the last."""

    def normalised(factor):
        factor = wide(factor)
        largest = np.abs(factor).max(initial=0)
        power = F32(2.0 ** (int(np.frexp(largest)[1]) - 1)) if largest else F32(2.0**-126)
        factor = factor / power
        return np.where(np.abs(factor) < F32(2.0**-50), F32(0), factor), power

    (left, of_left), (right, of_right) = normalised(left), normalised(right)
    total = left[:, :1] * right[:1]
    for k in range(1, left.shape[1]):
        total = total + left[:, k : k + 1] * right[k : k + 1]
    with np.errstate(over="ignore", invalid="ignore"):
        scale = flush(flush(F32(scale) * of_left) * of_right)
        return narrow(flush(wide(weights) + flush(scale * total)), np.asarray(weights).dtype)


def threefry(key, counter):
    """Threefry-2x32-20 after Salmon et al. (2011), in uint64 with explicit reduction."""
    mask = 0xFFFFFFFF
    k = [np.uint64(int(key[0])), np.uint64(int(key[1]))]
    k.append(k[0] ^ k[1] ^ np.uint64(0x1BD11BDA))
    x = [
        (counter[0].astype(np.uint64) + k[0]) & np.uint64(mask),
        (counter[1].astype(np.uint64) + k[1]) & np.uint64(mask),
    ]
    rotations = [13, 15, 26, 6, 17, 29, 16, 24]
    for r in range(20):
        n = np.uint64(rotations[r % 8])
        x[0] = (x[0] + x[1]) & np.uint64(mask)
        x[1] = ((x[1] << n) | (x[1] >> (np.uint64(32) - n))) & np.uint64(mask)
        x[1] ^= x[0]
        if r % 4 == 3:
            s = r // 4 + 1
            x[0] = (x[0] + k[s % 3]) & np.uint64(mask)
            x[1] = (x[1] + k[(s + 1) % 3] + np.uint64(s)) & np.uint64(mask)
    return x[0].astype(U32), x[1].astype(U32)


def fold_in(key, data):
    u, v = threefry(key, (np.zeros(1, U32), np.full(1, data, U32)))
    return int(u[0]), int(v[0])


def name_words(name):
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:8], "big")


def root(seed):
    return seed >> 32, seed & 0xFFFFFFFF


def words(seed, name, n, shape):
    key = fold_in(root(seed), 1)
    for word in name_words(name):
        key = fold_in(key, word)
    e = np.arange(math.prod(shape), dtype=np.uint64)
    index = (e >> np.uint64(32)).astype(U32), e.astype(U32)
    drawn = [word for j in range((n + 1) // 2) for word in threefry(fold_in(key, j), index)]
    return [word.astype(np.uint64).reshape(shape) for word in drawn[:n]]


def masks(seed, name, densities, shape):
    drawn = words(seed, name, len(densities), shape)
    return [w < np.uint64(math.floor(d * 2**32)) for w, d in zip(drawn, densities, strict=True)]


def breadcrumbs(x, density, gamma):
    """Which entries are left when the ⌊γN⌋ largest and then the smallest are dropped; all that tie are kept."""
    if density == 1:
        return np.full(x.shape, True)
    size, ordered = x.size, np.sort(np.abs(x), axis=None)
    kept = math.floor(density * size)
    largest = min(math.floor(gamma * size), size - kept)
    if kept == 0:
        return np.full(x.shape, False)
    return (np.abs(x) >= ordered[size - largest - kept]) & (np.abs(x) <= ordered[size - largest - 1])


def della(x, word, density, epsilon, rescale):
    """Each entry of each row kept with a probability that its rank gives, and divided by it."""
    if density == 1:
        return x
    out = np.zeros(x.shape, F32)
    for where in np.ndindex(x.shape[:-1]):
        row, last = np.abs(x[where]), 2 * (x.shape[-1] - 1) if x.ndim else 0
        for j, magnitude in enumerate(row):
            rank = int((row < magnitude).sum()) + int((row <= magnitude).sum()) - 1
            low, high = density - epsilon, density + epsilon
            p = low + (high - low) * rank / last if last else density
            if int(word[where][j]) < math.floor(p * 2**32):
                out[where][j] = flush(x[where][j] * F32(1 / p)) if rescale else x[where][j]
    return out


def stock(deltas, scale=1.0):
    """λ·t/n of Model Stock for one tensor or one row."""
    n = len(deltas)
    lengths = [math.sqrt(inner(d, d)) for d in deltas]
    cosines = []
    for i in range(n):
        for j in range(i + 1, n):
            norms = lengths[i] * lengths[j]
            cosines.append(min(1.0, max(-1.0, inner(deltas[i], deltas[j]) / norms)) if norms > 0 else 0.0)
    cosine = sum(cosines) / len(cosines)
    divisor = 1.0 + (n - 1) * cosine
    return scale * (n * cosine / divisor if divisor else 0.0) / n


RESOLUTION = 2.0**-11


def gram(vectors):
    found = {(i, j): inner(a, b) for i, a in enumerate(vectors) for j, b in enumerate(vectors) if i <= j}
    return [[found[min(i, j), max(i, j)] for j in range(len(vectors))] for i in range(len(vectors))]


def bilinear(a, matrix, b):
    return math.fsum(x * m * y for x, row in zip(a, matrix, strict=True) for m, y in zip(row, b, strict=True))


def nuslerp(vectors, weights):
    """The coefficients of both ends at t = w₁ / (w₀ + w₁) of the arc, or of the line where there is none."""
    t = weights[1] / sum(weights) if abs(sum(weights)) > 1e-6 * sum(map(abs, weights)) else 0.5
    (aa, ab), (_, bb) = gram(vectors)
    lengths = math.sqrt(aa) * math.sqrt(bb)
    cosine = min(1.0, max(-1.0, ab / lengths)) if lengths > 0 else 0.0
    if math.sqrt((1 - cosine) * (1 + cosine)) < RESOLUTION:
        return [1 - t, t]
    angle = math.acos(cosine)
    return [math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)]


def multislerp(vectors, weights, normalize=True, eps=1e-8):
    """All of the formula, over the coefficients of the experts: mean direction, tangents there, exponential map."""
    n, matrix = len(vectors), gram(vectors)
    weights = [w / sum(weights) for w in weights] if normalize else weights
    lengths = [math.sqrt(matrix[i][i]) for i in range(n)]
    units = [[1 / lengths[i] if i == j and lengths[i] else 0.0 for j in range(n)] for i in range(n)]
    total = [w * units[i][i] for i, w in enumerate(weights)]
    size = math.sqrt(max(bilinear(total, matrix, total), 0.0))
    if size <= max(eps, RESOLUTION * sum(abs(w) for w, length in zip(weights, lengths, strict=True) if length)):
        assert n == 2 or not any(lengths)
        return weights
    mean = [c / size for c in total]
    tangents = [[u - bilinear(unit, matrix, mean) * m for u, m in zip(unit, mean, strict=True)] for unit in units]
    r = [sum(w * tangent[j] for w, tangent in zip(weights, tangents, strict=True)) for j in range(n)]
    far = math.sqrt(max(bilinear(r, matrix, r), 0.0))
    reach = sum(w * length for w, length in zip(weights, lengths, strict=True))
    return [
        (m * math.cos(far) + x * (math.sin(far) / far if far else 1.0)) * reach for m, x in zip(mean, r, strict=True)
    ]


def karcher(vectors, weights, max_iter=10, tol=1e-5):
    """u ← exp_u(Σ wᵢ log_u(uᵢ)), over the coefficients of the unit vectors."""
    weights = [w / sum(weights) for w in weights]
    matrix = gram(vectors)
    lengths = [math.sqrt(matrix[i][i]) for i in range(len(vectors))]
    there = [i for i, length in enumerate(lengths) if length]
    if not there:
        return weights
    n, share = len(there), [weights[i] / sum(weights[j] for j in there) for i in there]
    unit = [
        [min(1.0, max(-1.0, matrix[i][j] / lengths[i] / lengths[j])) if i != j else 1.0 for j in there] for i in there
    ]
    size = math.sqrt(max(bilinear(share, unit, share), 0.0))
    mean = [float(i == 0) for i in range(n)] if size < max(tol, RESOLUTION) else [s / size for s in share]
    for _ in range(max_iter):
        step = [0.0] * n
        for i in range(n):
            own = [float(i == j) for j in range(n)]
            cosine = min(1.0, max(-1.0, bilinear(own, unit, mean)))
            sine = math.sqrt((1 - cosine) * (1 + cosine))
            stretch = math.acos(cosine) / sine if sine >= RESOLUTION else float(cosine > 0)
            step = [s + share[i] * stretch * (o - cosine * m) for s, o, m in zip(step, own, mean, strict=True)]
        far = math.sqrt(max(bilinear(step, unit, step), 0.0))
        if far < tol or far == 0:
            break
        mean = [math.cos(far) * m + math.sin(far) / far * s for m, s in zip(mean, step, strict=True)]
        size = math.sqrt(bilinear(mean, unit, mean))
        mean = [m / size for m in mean]
    reach = sum(w * length for w, length in zip(weights, lengths, strict=True))
    found = [0.0] * len(vectors)
    for i, m in zip(there, mean, strict=True):
        found[i] = m / lengths[i] * reach
    return found


GEOMETRIC = {"nuslerp": nuslerp, "multislerp": multislerp, "karcher": karcher}


def spanned(vectors, lines, coefficients):
    """Σ cᵢxᵢ, with coefficients of the whole, of each row or of each column."""
    shape = vectors[0].shape
    if lines == "column":
        vectors = [np.reshape(v, (math.prod(shape[:1]), math.prod(shape[1:]))).T for v in vectors]
    rows = [np.atleast_1d(v) for v in vectors]
    out = np.zeros(rows[0].shape, F32)
    for where in [...] if lines == "tensor" else np.ndindex(out.shape[:-1]):
        total = None
        for c, row in zip(coefficients([v[where] for v in rows]), rows, strict=True):
            term = flush(scalar(c) * row[where])
            total = term if total is None else flush(total + term)
        out[where] = total
    return np.reshape(out.T if lines == "column" else out, shape)


def draw(seed, alpha, n, group=None):
    from scipy.special import betaincinv

    key = fold_in(root(seed), 0)
    for word in [] if group is None else name_words(group):
        key = fold_in(key, word)
    weights, rest = [], 1.0
    for i in range(n - 1):
        u, v = threefry(key, (np.zeros(1, U32), np.full(1, i, U32)))
        p = (float(u[0]) * 2.0**32 + float(v[0]) + 0.5) / 2.0**64
        a, b = alpha if isinstance(alpha, tuple) else (alpha, alpha * (n - 1 - i))
        stick = float(F32(betaincinv(a, b, p)))
        weights.append(rest * stick)
        rest *= 1.0 - stick
    return [*weights, rest]


def walk(seed, alpha, n, groups, smooth):
    """Weights of neighbouring blocks: normal numbers, each `smooth` times the one before and the rest its own."""
    from scipy.special import betaincinv, ndtr, ndtri

    found, before = {}, None
    for group in groups:
        key = fold_in(root(seed), 0)
        for word in name_words(group):
            key = fold_in(key, word)
        numbers, weights, rest = [], [], 1.0
        for i in range(n - 1):
            u, v = threefry(key, (np.zeros(1, U32), np.full(1, i, U32)))
            own = ndtri((float(u[0]) * 2.0**32 + float(v[0]) + 0.5) / 2.0**64)
            numbers.append(own if before is None else smooth * before[i] + math.sqrt(1.0 - smooth * smooth) * own)
            a, b = alpha if isinstance(alpha, tuple) else (alpha, alpha * (n - 1 - i))
            stick = float(F32(betaincinv(a, b, ndtr(numbers[i]))))
            weights.append(rest * stick)
            rest *= 1.0 - stick
        before, found[group] = numbers, [*weights, rest]
    return found


def kth_smallest_magnitude(arrays, density):
    if density == 0:
        return F32(np.inf)  # nothing is kept
    flat = np.concatenate([np.abs(a).ravel() for a in arrays]) if arrays else np.zeros(0, F32)
    k = math.floor(flat.size * (1 - density))
    return F32(0) if k == 0 else np.sort(flat)[k - 1]


def inner(a, b):
    """Σ ab rounded term by term to 2⁻²⁹ of the power of two at or below the largest term, then summed exactly."""
    terms = flush((a * b).astype(F32)).ravel()
    top = np.abs(terms).max(initial=F32(0))
    exponent = (int(top.view(U32)) >> 23) - 127
    units = np.rint(np.ldexp(terms.astype(np.float64), 29 - exponent))
    return math.ldexp(sum(int(u) for u in units), exponent - 29)


def added(terms):
    total = terms[0]
    for term in terms[1:]:
        total = flush(total + term)
    return total


def sce(deltas, scale, select_topk):
    """Entries of the largest variance, then the mean of those of the elected sign by their energy."""
    n, gaps = len(deltas), []
    if select_topk < 1:
        for i in range(n):
            for j in range(i + 1, n):
                gap = flush(deltas[i] - deltas[j])
                gaps.append(flush(gap * gap))
        variance = added(gaps)
        kept = int(select_topk * np.count_nonzero(variance))
        least = np.sort(variance, axis=None)[variance.size - kept] if kept else np.inf
        deltas = [np.where(variance >= least, d, F32(0)) for d in deltas]
    energy = [inner(d, d) for d in deltas]
    sign = np.where(added(deltas) >= 0, 1, -1)
    agree = [np.sign(d) == sign for d in deltas]
    terms = []
    for i in range(n):
        c = np.zeros(deltas[i].shape, F32)
        for where in np.ndindex(c.shape):
            total = 0.0
            for j in range(n):
                total += energy[j] if agree[j][where] else 0.0
            c[where] = scalar(scale * (energy[i] / total)) if total and agree[i][where] else 0
        terms.append(np.where(agree[i], flush(c * deltas[i]), F32(0)))
    return added(terms)


def ram(deltas, scale, epsilon, r=None, alpha=None):
    """The mean of what was changed; with r, entries of one expert alone are enlarged."""
    changed = [np.abs(d) > F32(epsilon) for d in deltas]
    count = sum(c.astype(int) for c in changed)
    if r is not None:
        enlarged = []
        for d, c in zip(deltas, changed, strict=True):
            shared, alone = int((c & (count > 1)).sum()), int((c & (count == 1)).sum())
            factor = scalar(1.0 + r * min(shared / max(alone, 1), alpha))
            enlarged.append(np.where(count == 1, flush(factor * d), d))
        deltas = enlarged
    factor = np.array([0.0, *(scale / k for k in range(1, len(deltas) + 1))], F32)[count]
    return flush(factor * added([np.where(c, d, F32(0)) for c, d in zip(changed, deltas, strict=True)]))


def magmax(deltas, scale):
    """The largest in magnitude; the mean of those that tie."""
    largest = np.max([np.abs(d) for d in deltas], axis=0)
    tied = np.sum([np.abs(d) == largest for d in deltas], axis=0)
    signs = np.sum([np.sign(d) * (np.abs(d) == largest) for d in deltas], axis=0, dtype=np.float64)
    return flush((scale * (signs / tied)).astype(F32) * largest)


def consensus(deltas, weights, scale, limits, agreement, normalize):
    """The weighted sum where enough experts are no smaller than the others together."""
    n, total = len(deltas), sum(weights)
    terms = [
        flush(scalar(w * scale / total if normalize else w * scale) * d) for w, d in zip(weights, deltas, strict=True)
    ]
    none, matters = np.zeros_like(terms[0]), 0
    for i in range(n):
        others = flush((added(terms[:i]) if i else none) + (added(terms[:i:-1]) if i < n - 1 else none))
        matters = matters + (np.abs(terms[i]) >= flush(scalar(limits) * np.abs(others)))
    return np.where(matters >= agreement, added(terms), F32(0))


def polynomial(coefficients, x):
    total = np.full_like(x, F32(coefficients[0]))
    for c in coefficients[1:]:
        total = flush(flush(total * x) + F32(c))
    return total


def exp(x):
    """e^x for x in [0, 80]: Taylor of degree 7 around the nearest multiple of ln 2."""
    x = np.clip(x, F32(0), F32(80))
    k = np.rint(flush(x * F32(1.44269504)))
    rest = flush(flush(x - flush(k * F32(0.693359375))) - flush(k * F32(-2.12194440e-4)))
    return flush(polynomial([1 / math.factorial(i) for i in range(7, -1, -1)], rest) * np.ldexp(F32(1), k.astype(int)))


def reciprocal(x):
    """Newton's iteration from a guess that integers make."""
    size = np.abs(x)
    found = (U32(0x7EF311C7) - size.view(U32)).view(F32)
    for _ in range(4):
        found = flush(found + flush(found * flush(F32(1) - flush(size * found))))
    return np.copysign(found, x)


def tanh(x):
    size = np.minimum(np.abs(x), F32(10))
    square = flush(size * size)
    cubic = polynomial([62 / 2835, -17 / 315, 2 / 15, -1 / 3], square)
    near = flush(size + flush(flush(cubic * square) * size))
    half = reciprocal(flush(exp(size + size) + F32(1)))
    return np.where(x < 0, F32(-1), F32(1)) * np.where(size < F32(0.25), near, flush(F32(1) - (half + half)))


def spans(low, high):
    """Where a range begins, and one over its width."""
    width = float(high) - float(low)
    return F32(low), F32(1 / width if width > 0 and 1 / width < 2.0**120 else 0.0)


def even(x):
    """Of two neighbouring numbers the one whose pattern, ordered as the numbers are, is even."""
    bits = np.where(x == 0, F32(0), x).astype(F32).view(U32)
    order = np.where(bits >> U32(31), ~bits, bits | U32(2**31)) & U32(0xFFFFFFFE)
    return np.where(order < U32(2**31), ~order, order & U32(2**31 - 1)).astype(U32).view(F32)


def pcb(deltas, size, weights, scale, density, normalize):
    """The mean of entries by how they compete. Arrays hold everything that is ranked, in rows."""
    n, together, scores, clamped = len(deltas), added(deltas), [], []
    for d in deltas:
        ordered = np.sort(np.abs(d), axis=None)
        low, high = ordered[int(size * 0.0001)], ordered[max(int(size * 0.9999 - 1), 0)]
        clamped.append(np.clip(np.abs(d), low, high))
        first, inverse = spans(low, high)
        share = flush(flush(clamped[-1] - first) * inverse)
        alone = exp(flush(flush(share * share) * F32(n)))
        scores.append(even(flush(alone * tanh(flush(d * together)))))
    terms, shares = [], []
    for i, score in enumerate(scores):
        ordered = np.sort(score, axis=None)
        least, most = ordered[min(int(size * (1 - density)), size - 1)], ordered[-1]
        first, inverse = spans(least, most)
        share = flush(np.maximum(flush(score - first), F32(0)) * inverse)
        signed = (np.sign(deltas[i]) * clamped[i]).astype(F32)
        terms.append(flush(scalar(weights[i] * scale) * flush(share * signed)))
        shares.append(flush(scalar(weights[i] if normalize else 1.0) * share))
    total = added(shares)
    return flush(added(terms) * reciprocal(np.where(total == 0, F32(1), total)))


def selected(method, deltas, weights, scale, normalize, more):
    """The merged task vector of a tensor, for methods that select entries."""
    if method == "sce":
        return sce(deltas, scale, **more)
    if method in ("ram", "ramplus_tl"):
        return ram(deltas, scale, **more)
    if method == "nearswap":
        return np.clip(deltas[0], -scalar(more["t"]), scalar(more["t"]))
    if method == "magmax":
        return magmax(deltas, scale)
    if method == "pcb":
        return pcb(deltas, deltas[0].size, weights, scale, more["density"], normalize)
    return consensus(deltas, weights, scale, more["limits"], more["agreement"], normalize)


def fisher(values, statistics, weights, epsilon):
    """Every entry's mean by wᵢ·Fᵢ, or by wᵢ where these are all 0."""
    shares = [scalar(w / sum(weights)) for w in weights]
    told = [
        flush(c * np.where(wide(f) < scalar(epsilon), scalar(epsilon), wide(f)))
        for c, f in zip(shares, statistics, strict=True)
    ]
    total = added(told)
    divisor = np.where(total == 0, F32(1), total)
    parts = [np.where(total == 0, c, flush(t / divisor)) for c, t in zip(shares, told, strict=True)]
    return added([flush(part * value) for part, value in zip(parts, values, strict=True)])


# --- RegMean: equations in blocks of 128, products of slices of 22 bits in Python's and int64's integers -----------

EDGE, DIGITS = 128, 22


def cut(matrix, axis, count):
    """Integers of 22 bits that count 2^(e − 22), 2^(e − 44), … and e of each line along an axis."""
    top = np.abs(matrix).max(axis=axis, keepdims=True, initial=0)
    e = np.where(top > 0, np.frexp(top)[1], 0)
    rest, found = np.ldexp(matrix, DIGITS - e), []
    for _ in range(count):
        whole = np.rint(rest)
        found.append(whole.astype(np.int64))
        rest = np.ldexp(rest - whole, DIGITS)
    return found, e


def times(a, b, count=3):
    """A·B, its inner axis no longer than a block."""
    (left, p), (right, q) = cut(a, 1, count), cut(b, 0, count)
    total = np.zeros((len(a), b.shape[1]))
    for level in range(count - 1, -1, -1):
        exact = sum(left[i] @ right[level - i] for i in range(level + 1))
        total = exact.astype(np.float64) + np.ldexp(total, -DIGITS)
    return np.ldexp(total, p + q - 2 * DIGITS)


def edges(size):
    return [(at, min(at + EDGE, size)) for at in range(0, size, EDGE)]


def cholesky(s):
    """D·S·D = L·Lᵀ, and the inverses of the blocks on L's diagonal."""
    power = np.array([2.0 ** -((math.frexp(d)[1] - 1) // 2) for d in np.diagonal(s)])
    rest, size, inverses = s * power[:, None] * power[None], len(s), []
    lower = np.zeros_like(rest)
    for at, end in edges(size):
        for k in range(at, end):
            lower[k:end, k] = rest[k:end, k] / math.sqrt(rest[k, k])
            for j in range(k + 1, end):
                rest[j:end, j] = rest[j:end, j] - lower[j:end, k] * lower[j, k]
        inverse = np.eye(end - at)
        for k in range(end - at):
            inverse[k] = inverse[k] / lower[at + k, at + k]
            for j in range(k + 1, end - at):
                inverse[j] = inverse[j] - lower[at + j, at + k] * inverse[k]
        inverses.append(inverse)
        if end < size:
            lower[end:, at:end] = times(rest[end:, at:end], inverse.T)
            rest[end:, end:] = rest[end:, end:] - times(lower[end:, at:end], lower[end:, at:end].T)
    return lower, inverses, power


def divided(right, lower, inverses, power):
    """X of X·S = R."""
    x, places = right * power, list(zip(edges(len(lower)), inverses, strict=True))
    for (at, end), inverse in places:
        x[:, at:end] = times(x[:, at:end], inverse.T)
        x[:, end:] = x[:, end:] - times(x[:, at:end], lower[end:, at:end].T)
    for (at, end), inverse in places[::-1]:
        x[:, at:end] = times(x[:, at:end], inverse)
        x[:, :at] = x[:, :at] - times(x[:, at:end], lower[at:end, :at])
    return x * power


def regmean(values, statistics, weights, ratio, out):
    """x₀ + Σ (xᵢ − x₀)·wᵢGᵢ'·(Σ wⱼGⱼ')⁻¹ for weights [out, in], rounded once."""
    told = []
    for gram, weight in zip(statistics, weights, strict=True):
        g = (wide(gram).astype(np.float64) + wide(gram).astype(np.float64).T) * 0.5
        told.append(np.where(np.eye(len(g), dtype=bool), g * weight, g * ratio * weight))
    total = told[0]
    for each in told[1:]:
        total = total + each
    for k in np.flatnonzero(np.diagonal(total) == 0):
        total[k, k] = sum(weights)
        for each, weight in zip(told, weights, strict=True):
            each[k, k] = weight
    factor = cholesky(total)
    first = values[0].astype(np.float64)
    merged = first.copy()
    for value, each in zip(values[1:], told[1:], strict=True):
        coefficients, move = divided(each, *factor), value - first
        parts = np.zeros_like(merged)
        for at, end in edges(move.shape[1]):
            parts = parts + times(move[:, at:end], coefficients[at:end], 2)
        merged = merged + parts
    single = merged.astype(F32)
    if out != "float32":  # what is exactly between two numbers of 16 bits is so in float64 too
        digits = {"bfloat16": 8, "float16": 11}[out]
        coarse = np.ldexp(1.0, np.frexp(merged)[1] - digits)
        single = (np.rint(merged / coarse) * coarse).astype(F32)
    return narrow(flush(single), out)


SELECTION = ("sce", "ram", "ramplus_tl", "nearswap", "magmax", "consensus", "pcb")


def merge(
    experts,  # list of {name: array}
    base=None,
    method="linear",
    weights=None,  # list of n, or {name: list of n}; slerp: one t
    *,
    seed=0,
    out=None,
    scale=1.0,  # or {name: scale}
    normalize=None,
    density=None,  # TIES's trim
    trim_scope="tensor",
    election="weighted",
    sparsify=None,  # None | "dare" | "magnitude"
    keep=None,  # the sparsifier's density: a number or one per expert
    gamma=0.01,
    epsilon=0.15,
    by_row=False,
    target="delta",
    rescale=None,
    scope="tensor",
    more=None,  # own parameters of a method that selects entries
    deltas=False,  # of methods that take task vectors or not
    lines="tensor",  # what has an angle of its own: "tensor", "row" or "column"
    statistics=None,  # list of {name: array}; what they lack is averaged
):
    n, names = len(experts), list(experts[0])
    normalize = (method in ("linear", "ties")) if normalize is None else normalize
    rescale = (sparsify in ("dare", "della")) if rescale is None else rescale
    keep = [1.0] * n if keep is None else list(keep) if isinstance(keep, tuple | list) else [keep] * n
    trim = [density] * n if not isinstance(density, tuple | list) else list(density)
    weights = (
        weights
        if isinstance(weights, dict)
        else {name: weights if weights is not None else [1.0] * n for name in names}
    )
    scales = scale if isinstance(scale, dict) else dict.fromkeys(names, scale)
    on_deltas = ("task_arithmetic", "ties", "model_stock", *SELECTION)
    takes_deltas = method in on_deltas or deltas or (sparsify and target == "delta")
    folded = [d if sparsify and sparsify != "della" and rescale and target == "delta" else 1.0 for d in keep]

    def raw(name, i):
        x = wide(experts[i][name])
        return flush(x - wide(base[name])) if takes_deltas and target == "delta" else x

    values = {(name, i): raw(name, i) for name in names for i in range(n)}
    if sparsify == "dare":
        for name in names:
            for i, mask in enumerate(masks(seed, name, keep, np.shape(experts[0][name]))):
                values[name, i] = np.where(mask, values[name, i], F32(0))
    for name in names if sparsify == "breadcrumbs" else ():
        for i in range(n):
            values[name, i] = np.where(breadcrumbs(values[name, i], keep[i], gamma), values[name, i], F32(0))
    for name in names if sparsify == "della" else ():
        for i, word in enumerate(words(seed, name, n, np.shape(experts[0][name]))):
            x = np.atleast_1d(values[name, i])
            values[name, i] = della(x, np.atleast_1d(word), keep[i], epsilon, rescale).reshape(values[name, i].shape)
    if sparsify == "magnitude":
        for group in [names] if scope == "model" else [[name] for name in names]:
            for i in range(n):
                least = kth_smallest_magnitude([values[name, i] for name in group], keep[i])
                for name in group:
                    values[name, i] = np.where(np.abs(values[name, i]) >= least, values[name, i], F32(0))
    if sparsify and sparsify != "della" and target == "weights":
        for name, i in values:
            values[name, i] = flush(values[name, i] * scalar(1 / keep[i] if rescale and keep[i] else 1.0))
    if takes_deltas and target == "weights":
        values = {(name, i): flush(v - wide(base[name])) for (name, i), v in values.items()}

    if method == "ties" and density is not None:
        for group in [names] if trim_scope == "model" else [[name] for name in names]:
            for i in range(n):
                least = kth_smallest_magnitude([values[name, i] for name in group], trim[i])
                for name in group:
                    values[name, i] = np.where(np.abs(values[name, i]) >= least, values[name, i], F32(0))

    inverse = [1 / d if d else 0.0 for d in folded]
    votes, elected = {}, {}
    if method == "ties":
        for name in names:
            for i in range(n):
                e = (weights[name][i] if election == "weighted" else 1.0) * (inverse[i] / (max(inverse) or 1.0))
                votes[name, i] = flush(values[name, i] * scalar(e))
            total = votes[name, 0]
            for i in range(1, n):
                total = flush(total + votes[name, i])
            elected[name] = np.sign(total)
        balance = sum(int(np.sign(e).sum(dtype=np.float64)) for e in elected.values())
        tie = 1.0 if election == "weighted" else float(np.sign(balance))
        elected = {name: np.where(e == 0, tie, e) for name, e in elected.items()}

    merged = {}
    for name in names:
        w, scale = weights[name], scales[name]
        if method == "regmean" and name in statistics[0]:
            own = [values[name, i] for i in range(n)]
            dtype = out or np.asarray(experts[0][name]).dtype.name
            merged[name] = regmean(own, [s[name] for s in statistics], w, more["ratio"], dtype)
            continue
        if method in ("fisher", "regmean"):
            told = [{**more, "statistics": [s[name] for s in statistics]}] if name in statistics[0] else []
            own = [values[name, i] for i in range(n)]
            shares = [scalar(c / sum(w)) for c in w]
            average = added([flush(c * v) for c, v in zip(shares, own, strict=True)])
            total = fisher(own, weights=w, **told[0]) if told else average
            merged[name] = narrow(total, out or np.asarray((base or experts[0])[name]).dtype.name)
            continue
        if method == "slerp":
            a, b = values[name, 0], values[name, 1]
            t = float(w if np.ndim(w) == 0 else w[0])
            norms = math.sqrt(inner(a, a)) * math.sqrt(inner(b, b))
            cosine = min(1.0, max(-1.0, inner(a, b) / norms)) if norms > 0 else 1.0
            if abs(cosine) > 0.9995:
                w = [1.0 - t, t]
            else:
                w = [
                    math.sin((1 - t) * math.acos(cosine)) / math.sin(math.acos(cosine)),
                    math.sin(t * math.acos(cosine)) / math.sin(math.acos(cosine)),
                ]
        if method == "model_stock":
            deltas = [values[name, i] for i in range(n)]
            rows = [[np.atleast_1d(d)[r] for d in deltas] for r in np.ndindex(np.atleast_1d(deltas[0]).shape[:-1])]
            factors = [scalar(stock(row, scale)) for row in rows] if by_row else [scalar(stock(deltas, scale))]
            factor = np.reshape(factors, (*np.shape(deltas[0])[:-1], 1) if by_row else ()).astype(F32)
            total = None
            for delta in deltas:
                term = flush(factor * delta).reshape(delta.shape)
                total = term if total is None else flush(total + term)
            total = flush(total + wide(base[name]))
            merged[name] = narrow(total, out or np.asarray(base[name]).dtype.name)
            continue
        if method in SELECTION:
            own = [values[name, i] for i in range(n)]
            together = method == "pcb" and trim_scope == "model"  # ranked over all tensors
            if together:
                every = [np.concatenate([values[each, i].ravel() for each in names]) for i in range(n)]
                whole = selected(method, every, w, scale, normalize, more)
                sizes = np.cumsum([values[each, 0].size for each in names])[:-1]
                task = dict(zip(names, np.split(whole, sizes), strict=True))[name].reshape(own[0].shape)
            else:
                task = selected(method, own, w, scale, normalize, more or {})
            total = flush(task + wide(base[name]))
            merged[name] = narrow(total, out or np.asarray(base[name]).dtype.name)
            continue
        if method in GEOMETRIC:
            total = spanned([values[name, i] for i in range(n)], lines, lambda v, w=w: GEOMETRIC[method](v, w))
            total = flush(total + wide(base[name])) if takes_deltas else total
            merged[name] = narrow(total, out or np.asarray((base or experts[0])[name]).dtype.name)
            continue
        total = None
        agree = [
            (np.sign(votes[name, i]) == elected[name]) & (votes[name, i] != 0)
            if method == "ties"
            else np.full(values[name, i].shape, True)
            for i in range(n)
        ]
        subset = sum(a.astype(np.int64) << i for i, a in enumerate(agree))
        for i in range(n):
            c = np.empty(2**n, F32)
            for s in range(2**n):
                members = [w[j] for j in range(n) if s >> j & 1]
                norm = 0.0
                for m in members:
                    norm += m
                if method == "slerp":
                    c[s] = scalar(w[i])
                elif folded[i] == 0:
                    c[s] = 0
                elif normalize and norm != 0:
                    c[s] = scalar(w[i] * scale / folded[i] / norm)
                else:
                    c[s] = scalar(w[i] * scale / folded[i])
            term = np.where(agree[i], flush(c[subset] * values[name, i]), F32(0))
            total = term if total is None else flush(total + term)
        if takes_deltas:
            total = flush(total + wide(base[name]))
        dtype = out or np.asarray((base or experts[0])[name]).dtype.name
        merged[name] = narrow(total, dtype)
    return merged
