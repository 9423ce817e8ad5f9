"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const n = data.ids.length, size = data.size, area = size * size;
  const grades = Object.entries(data.grades);
  const gradeNames = data.grades;
  const NAME = "meas_deeplearn.inspection.name";

  // ---- Votes -------------------------------------------------------------

  // Votes of this voter: by candidate ID, [grade, time, seconds, saw the
  // score]; and what undo takes back, [ID, vote before].
  let state, voter = "";
  const storeKey = () => `meas_deeplearn.inspection.${data.page}.${voter}`;

  function warn(text) {
    $("warning").textContent = text;
    $("warning").hidden = false;
  }

  function load() {
    state = { votes: {}, history: [] };
    try {
      const stored = voter ? JSON.parse(localStorage.getItem(storeKey())) : null;
      if (stored && typeof stored.votes === "object" && Array.isArray(stored.history)) state = stored;
    } catch (error) {
      warn("Votes cast earlier cannot be read; export those of today before you close the page. (" + error.message + ")");
    }
  }

  function loadName() {
    try {
      voter = localStorage.getItem(NAME) || "";
    } catch (error) {
      voter = "";
    }
  }

  function save() {
    try {
      localStorage.setItem(NAME, voter);
      localStorage.setItem(storeKey(), JSON.stringify(state));
    } catch (error) {
      warn("The votes cannot be kept in this browser; export them before you close the page. (" + error.message + ")");
    }
  }

  const gradeOf = (i) => (state.votes[data.ids[i]] || [""])[0];

  function quote(value) {
    const text = String(value);
    return /[",\n\r]/.test(text) ? '"' + text.replaceAll('"', '""') + '"' : text;
  }

  function exportVotes() {
    if (!voter) return askName();
    const rows = [["candidate_id", "skymap", "tract", "voter", "grade", "time", "seconds", "saw_score"]];
    data.ids.forEach((id, i) => {
      const vote = state.votes[id];
      if (vote) rows.push([id, data.skymap, data.tract[i], voter, vote[0], vote[1], vote[2], vote[3]]);
    });
    const text = rows.map((row) => row.map(quote).join(",")).join("\r\n") + "\r\n";
    const slug = (part) => part.normalize("NFKD").replace(/[^A-Za-z0-9]+/g, "-").replace(/^-|-$/g, "").toLowerCase();
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
    link.download = ["votes", slug(data.title), slug(voter), new Date().toISOString().slice(0, 16).replace(/[:T]/g, "")]
      .filter(Boolean).join("_") + ".csv";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    say(`Exported ${rows.length - 1} votes as ${link.download}.`);
  }

  // Rows of fields of a CSV file.
  function parseCsv(text) {
    const rows = [[]];
    let field = "", quoted = false;
    const endField = () => { rows[rows.length - 1].push(field); field = ""; };
    for (let k = 0; k < text.length; k++) {
      const c = text[k];
      if (quoted) {
        if (c !== '"') field += c;
        else if (text[k + 1] === '"') { field += c; k++; } else quoted = false;
      } else if (c === '"' && !field) quoted = true;
      else if (c === ",") endField();
      else if (c === "\n") { endField(); rows.push([]); } else if (c !== "\r") field += c;
    }
    if (quoted) throw new Error("it ends within quotes");
    endField();
    return rows.filter((row) => row.length > 1 || row[0]);
  }

  // Take back what was exported, here or elsewhere; the later vote counts.
  function importVotes(text, file) {
    const [header = [], ...rows] = parseCsv(text.replace(/^\ufeff/, ""));
    const columns = ["candidate_id", "voter", "grade", "time"], place = (name) => header.indexOf(name);
    const missing = columns.filter((name) => place(name) < 0);
    if (missing.length) throw new Error(`it has no column ${missing.join(", ")}`);
    const voters = new Set(rows.map((row) => row[place("voter")]));
    if (voters.size > 1) throw new Error("it has votes of several voters");
    const [name] = voters;
    if (name && voter && name !== voter) throw new Error(`its votes are those of ${name}; change your name to this first`);
    const here = new Set(data.ids);
    let taken = 0, elsewhere = 0, older = 0;
    const votes = { ...state.votes };
    rows.forEach((row, k) => {
      const get = (column) => (place(column) < 0 ? "" : row[place(column)] || "");
      const id = get("candidate_id"), grade = get("grade"), time = new Date(get("time"));
      if (row.length !== header.length || !(grade in gradeNames) || isNaN(time)) throw new Error(`line ${k + 2} is no vote`);
      if (!here.has(id)) { elsewhere++; return; }
      const previous = votes[id];
      if (previous && !(time > new Date(previous[1]))) { older++; return; }
      votes[id] = [grade, time.toISOString(), Number(get("seconds") || 0).toFixed(1), Number(get("saw_score") === "1")];
      taken++;
    });
    if (!voter && name) voter = name;
    state = { votes, history: [] };
    save();
    refreshAll();
    say(`Imported ${taken} votes from ${file}.` + (older ? ` ${older} were here already, or a later one.` : "") +
      (elsewhere ? ` ${elsewhere} are on candidates of another page.` : ""));
  }

  // ---- Pixels ------------------------------------------------------------

  // What a byte stands for, in units of the noise of its band.
  const level = new Float32Array(256);
  for (let k = 1; k < 256; k++) level[k] = data.scale.soft * Math.sinh(data.scale.low + (k - 1) * data.scale.step);

  const decoded = new Map();
  function getPixels(i) {
    let pixels = decoded.get(i);
    if (pixels) return pixels;
    const text = atob(data.pixels[i]);
    pixels = new Uint8Array(text.length);
    for (let k = 0; k < text.length; k++) pixels[k] = text.charCodeAt(k);
    decoded.set(i, pixels);
    if (decoded.size > 600) decoded.delete(decoded.keys().next().value);
    return pixels;
  }

  const views = [];
  if (data.colors.length) {
    views.push({ key: "colour", label: "Colour", kind: "colour", stretch: data.stretch.stretch, q: data.stretch.q });
    views.push({ key: "faint", label: "Faint", kind: "colour", stretch: data.stretch.stretch * 0.35, q: data.stretch.q });
    views.push({ key: "core", label: "Core", kind: "core", q: 3 });
  }
  data.bands.forEach((band, b) => views.push({ key: band, label: band, kind: "band", b: b, stretch: data.stretch.stretch, q: data.stretch.q }));
  if (data.colors.length > 1) {
    const blue = data.colors[data.colors.length - 1], red = data.colors[0];
    views.push({ key: "difference", label: `${data.bands[blue]} \u2212 \u03b1 ${data.bands[red]}`, kind: "difference", blue, red });
  }
  const describe = {
    colour: "colour composite", faint: "colour composite, faint light", core: "colour composite, bright core",
    difference: "difference of bands, the middle removed; PSFs not matched",
  };
  const viewText = (view) => describe[view.key] || `band ${view.key}`;
  let view = views[0], brightness = 0;

  // The stretch of Lupton et al. (2004) as in astropy, from 0 to 255.
  function makeStretch(stretch, q) {
    const slope = 25.5 / Math.asinh(0.1 * q), soften = q / (stretch * 10 ** (-brightness / 10));
    return (x) => Math.asinh(x * soften) * slope;
  }

  function isSeen(pixels, b) {
    for (let k = b * area; k < (b + 1) * area; k++) if (pixels[k]) return true;
    return false;
  }

  const image = new ImageData(size, size);

  // Draw candidate i as seen in a view into `image`.
  function paint(i, view) {
    const pixels = getPixels(i), gain = data.gain[i], out = image.data, none = data.stretch.no_data;
    let bands = view.kind === "band" ? [view.b] : view.kind === "difference" ? [view.red, view.blue] : data.colors;
    bands = bands.filter((b) => isSeen(pixels, b));
    const put = (p, red, green, blue) => {
      // The first row is the lowest.
      const o = 4 * ((size - 1 - ((p / size) | 0)) * size + (p % size));
      out[o] = red; out[o + 1] = green; out[o + 2] = blue; out[o + 3] = 255;
    };
    const value = (b, p) => level[pixels[b * area + p]] * (view.kind === "band" ? 1 : gain[b]);
    const isBad = (p) => bands.some((b) => !pixels[b * area + p]);
    if (!bands.length || (view.kind === "difference" && bands.length < 2)) {
      for (let p = 0; p < area; p++) put(p, ...none);
      return;
    }
    if (view.kind === "difference") return paintDifference(view, value, isBad, put, none, gain);
    let stretch = view.stretch;
    if (view.kind === "core") {
      let peak = 30;
      const middle = size / 2, reach = Math.min(middle, 1.5 / data.pixel_scale);
      for (let p = 0; p < area; p++) {
        if (Math.hypot((p % size) + 0.5 - middle, ((p / size) | 0) + 0.5 - middle) > reach || isBad(p)) continue;
        peak = Math.max(peak, bands.reduce((sum, b) => sum + value(b, p), 0) / bands.length);
      }
      stretch = peak / 3.2;
    }
    const map = makeStretch(stretch, view.q), black = data.stretch.black;
    for (let p = 0; p < area; p++) {
      if (isBad(p)) { put(p, ...none); continue; }
      let red = value(bands[0], p) - black, green = red, blue = red;
      if (bands.length === 3) {
        green = value(bands[1], p) - black; blue = value(bands[2], p) - black;
      } else if (bands.length === 2) {
        red = green = blue = (red + value(bands[1], p) - black) / 2;
      }
      const intensity = (red + green + blue) / 3;
      let factor = intensity > 0 ? map(intensity) / intensity : 0;
      const top = Math.max(red, green, blue) * factor;
      if (top > 255) factor *= 255 / top;
      put(p, red * factor, green * factor, blue * factor);
    }
  }

  // Blue minus red, scaled so that the middle vanishes.
  function paintDifference(view, value, isBad, put, none, gain) {
    const middle = size / 2, reach = Math.min(middle, 0.9 / data.pixel_scale);
    let red = 0, blue = 0;
    for (let p = 0; p < area; p++) {
      if (isBad(p) || Math.hypot((p % size) + 0.5 - middle, ((p / size) | 0) + 0.5 - middle) > reach) continue;
      red += value(view.red, p); blue += value(view.blue, p);
    }
    const alpha = red > 0 ? Math.max(blue / red, 0) : 0;
    const noise = Math.hypot(gain[view.blue], alpha * gain[view.red]) * 10 ** (-brightness / 10);
    for (let p = 0; p < area; p++) {
      if (isBad(p)) { put(p, ...none); continue; }
      const x = (value(view.blue, p) - alpha * value(view.red, p)) / noise;
      const grey = 80 + 32 * Math.asinh(x), tint = 0.3 * Math.max(-1, Math.min(1, x / 8));
      put(p, grey * (1 - Math.max(tint, 0)), grey * (1 - Math.abs(tint) / 3), grey * (1 + Math.min(tint, 0)));
    }
  }

  function draw(canvas, i, view) {
    canvas.width = canvas.height = size;
    paint(i, view);
    canvas.getContext("2d").putImageData(image, 0, 0);
  }

  // ---- The list ----------------------------------------------------------

  let order = [], current = -1, shownSince = 0, scoresShown = data.show_scores;
  const details = data.details, machine = (key) => details.find((detail) => detail.key === key);
  const cards = [], dirty = new Uint8Array(n).fill(1), visible = new Set();

  function makeCard(i) {
    const card = document.createElement("div");
    card.className = "card";
    card.id = "card" + i;
    card.setAttribute("role", "option");
    card.setAttribute("aria-selected", "false");
    const canvas = document.createElement("canvas");
    canvas.width = canvas.height = 1;
    canvas.setAttribute("aria-hidden", "true");
    const badge = document.createElement("span");
    badge.className = "badge";
    badge.hidden = true;
    const known = document.createElement("span");
    known.className = "known";
    known.textContent = "known";
    const caption = document.createElement("span");
    caption.className = "caption";
    const number = document.createElement("span"), score = document.createElement("span");
    caption.append(number, score);
    card.append(canvas, badge, known, caption);
    if (data.flags[i].length) {
      const flag = document.createElement("span");
      flag.className = "flag";
      flag.textContent = "\u2691";
      flag.title = data.flags[i].map((f) => data.flag_names[f]).join(", ");
      card.append(flag);
    }
    number.textContent = i + 1;
    return { card, canvas, badge, known, score };
  }

  function refreshCard(i) {
    const { card, badge, known, score } = cards[i], grade = gradeOf(i);
    badge.hidden = !grade;
    badge.textContent = grade;
    badge.className = "badge " + grade;
    card.classList.toggle("graded", Boolean(grade));
    const value = machine("score") ? machine("score").values[i] : null;
    score.textContent = maySee(i) && value !== null ? value.toFixed(3) : "";
    const name = machine("known_lens") && maySee(i) ? machine("known_lens").values[i] : null;
    known.hidden = !name;
    known.title = name ? `Known lens: ${name}` : "";
    const flags = data.flags[i].map((f) => data.flag_names[f]);
    card.setAttribute("aria-label", `Candidate ${i + 1}, ${grade ? "grade " + gradeNames[grade] : "no grade"}` +
      (score.textContent ? `, score ${score.textContent}` : "") + (name ? ", known lens" : "") + (flags.length ? `, flags: ${flags.join(", ")}` : ""));
  }

  function format(detail, value) {
    if (typeof value !== "number") return value;
    // Few of the sky's galaxies are lenses.
    if (detail.is_probability && value > 0 && value < 0.001) return value.toExponential(1).replace("-", "\u2212");
    return value.toFixed(detail.digits);
  }

  const maySee = (i) => scoresShown || Boolean(gradeOf(i));

  const observer = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      const i = Number(entry.target.id.slice(4));
      if (entry.isIntersecting) { visible.add(i); refreshThumbnail(i); } else visible.delete(i);
    }
  }, { root: null, rootMargin: "300px" });

  function refreshThumbnail(i) {
    if (!dirty[i]) return;
    draw(cards[i].canvas, i, view);
    dirty[i] = 0;
  }

  function refreshThumbnails() {
    dirty.fill(1);
    visible.forEach(refreshThumbnail);
  }

  const keep = {
    all: () => true,
    none: (i) => !gradeOf(i),
    any: (i) => Boolean(gradeOf(i)),
  };
  grades.forEach(([key]) => { keep[key] = (i) => gradeOf(i) === key; });
  const sorters = [["page", "Page order"], ["ungraded", "Without a grade first"], ["id", "ID"], ["ra", "Right ascension"]];
  details.filter((detail) => detail.values.some((value) => typeof value === "number") && detail.key !== "patch")
    .forEach((detail) => sorters.push([detail.key, detail.label]));

  function compare(key) {
    const big = data.ids.map((id) => BigInt(id));
    const detail = machine(key);
    if (key === "id") return (a, b) => (big[a] < big[b] ? -1 : big[a] > big[b] ? 1 : 0);
    if (key === "ra") return (a, b) => data.ra[a] - data.ra[b];
    if (key === "ungraded") return (a, b) => Boolean(gradeOf(a)) - Boolean(gradeOf(b)) || a - b;
    if (!detail) return (a, b) => a - b;
    // The best first: small ranks and magnitudes, large of all else.
    const sign = ["rank", "magnitude", "masked_fraction"].includes(key) ? 1 : -1;
    const values = detail.values.map((value) => (value === null || (key === "rank" && value < 1) ? Infinity : sign * value));
    return (a, b) => (values[a] === values[b] ? a - b : values[a] - values[b]);
  }

  function refreshList() {
    const search = $("search").value.trim(), flags = $("flags").value, minimum = parseFloat($("minimum").value);
    const score = machine("score"), wanted = keep[$("filter").value];
    order = [];
    for (let i = 0; i < n; i++) {
      if (!wanted(i) || (search && !data.ids[i].includes(search))) continue;
      if ((flags === "without" && data.flags[i].length) || (flags === "with" && !data.flags[i].length)) continue;
      if (score && scoresShown && minimum > 0 && !(score.values[i] >= minimum)) continue;
      order.push(i);
    }
    order.sort(compare($("sort").value));
    const nodes = order.map((i, k) => {
      cards[i].card.setAttribute("aria-posinset", k + 1);
      cards[i].card.setAttribute("aria-setsize", order.length);
      return cards[i].card;
    });
    if (!nodes.length) {
      const empty = document.createElement("div");
      empty.className = "empty";
      empty.textContent = "No candidate fits the filter.";
      nodes.push(empty);
    }
    showNodes(nodes);
    if (order.includes(current)) select(current); else select(order.length ? order[0] : -1);
  }

  // Put elements into the list; if some of those there only go, the others are
  // left alone, as laying out thousands takes its time.
  function showNodes(nodes) {
    const wanted = new Set(nodes), there = [...$("list").children], stay = there.filter((node) => wanted.has(node));
    if (stay.length === nodes.length && stay.every((node, k) => node === nodes[k])) {
      for (const node of there) if (!wanted.has(node)) node.remove();
    } else $("list").replaceChildren(...nodes);
  }

  // ---- The candidate -----------------------------------------------------

  function select(i, { announce = false } = {}) {
    if (cards[current]) cards[current].card.setAttribute("aria-selected", "false");
    if (i !== current) shownSince = performance.now();
    current = i;
    $("detail").hidden = i < 0;
    if (i < 0) { $("list").removeAttribute("aria-activedescendant"); return; }
    const { card } = cards[i];
    card.setAttribute("aria-selected", "true");
    if (card.isConnected) {
      $("list").setAttribute("aria-activedescendant", card.id);
      card.scrollIntoView({ block: "nearest" });
    } else $("list").removeAttribute("aria-activedescendant");
    refreshDetail();
    if (announce) say(card.getAttribute("aria-label"));
  }

  const buffer = document.createElement("canvas");
  function refreshPicture() {
    if (current < 0) return;
    const big = $("big"), zoom = Number($("zoom").value), scale = 8;
    draw(buffer, current, view);
    big.width = big.height = size * scale;
    const context = big.getContext("2d"), part = size / zoom, start = (size - part) / 2;
    context.imageSmoothingEnabled = $("smooth").checked;
    context.imageSmoothingQuality = "high";
    context.drawImage(buffer, start, start, part, part, 0, 0, big.width, big.height);
    $("bar").parentElement.classList.toggle("rough", !$("smooth").checked);
    const extent = part * data.pixel_scale;
    big.setAttribute("aria-label", `Candidate ${current + 1}, ${viewText(view)}, ${extent.toFixed(1)} arcsec wide`);
    const length = [20, 10, 5, 2, 1, 0.5].find((bar) => bar < 0.32 * extent) || 0.5;
    $("bar").textContent = `${length}\u2033`;
    $("bar").style.width = `${(100 * length) / extent}%`;
    views.forEach((other, k) => draw($("views").children[k].firstChild, current, other));
  }

  function refreshDetail() {
    const i = current, grade = gradeOf(i);
    const heading = $("heading"), small = document.createElement("small");
    small.textContent = data.ids[i];
    heading.replaceChildren(`Candidate ${i + 1} of ${n}`, small);
    for (const button of $("grades").children) button.setAttribute("aria-pressed", String(button.dataset.grade === grade));
    const facts = [];
    const fact = (name, text, className, title) => {
      const dt = document.createElement("dt"), dd = document.createElement("dd");
      dt.textContent = name;
      dd.textContent = text;
      if (className) dd.className = className;
      if (title) dt.title = title;
      facts.push(dt, dd);
    };
    if (data.ra[i] !== null) {
      fact("RA", data.ra[i].toFixed(5) + "\u00b0");
      fact("Dec", (data.dec[i] < 0 ? "\u2212" : "+") + Math.abs(data.dec[i]).toFixed(5) + "\u00b0");
    }
    if (data.tract[i] >= 0) fact("Tract", data.tract[i]);
    let hidden = 0;
    for (const detail of details) {
      const value = detail.values[i];
      if (detail.is_machine && !maySee(i)) { hidden++; continue; }
      if (value === null) continue;
      const errors = detail.errors.map((column) => column[i]);
      let text = format(detail, value);
      if (errors.length && !errors.includes(null)) {
        text += errors.length > 1 ? ` (${errors.map((e) => format(detail, e)).join(" to ")})` : ` \u00b1 ${format(detail, errors[0])}`;
      }
      fact(detail.label, `${text} ${detail.unit}`.trim(), "", detail.title);
    }
    if (data.flags[i].length) fact("Flags", data.flags[i].map((f) => data.flag_names[f]).join(", "), "bad");
    if (hidden) fact("Machine", "after your grade");
    $("facts").replaceChildren(...facts);
    const truth = data.truth ? data.truth[i] : null, known = grade && truth !== null;
    $("truth").hidden = !known;
    $("truth").textContent = known ? (truth ? "This one is known to be a lens." : "This one is known not to be a lens.") : "";
    const mayFollow = data.ra[i] !== null && (grade || !data.links_after_vote);
    $("links").replaceChildren(...(!mayFollow ? [] : data.viewers.flatMap(([name, address]) => {
      const link = document.createElement("a");
      link.textContent = name;
      link.href = address.replaceAll("{ra}", data.ra[i]).replaceAll("{dec}", data.dec[i]);
      link.target = "_blank";
      link.rel = "noopener noreferrer";
      return [link, " "];
    })));
    refreshPicture();
  }

  function refreshProgress() {
    const counts = Object.fromEntries(grades.map(([key]) => [key, 0]));
    for (let i = 0; i < n; i++) if (gradeOf(i)) counts[gradeOf(i)]++;
    const done = Object.values(counts).reduce((a, b) => a + b, 0);
    $("progress").max = n;
    $("progress").value = done;
    $("progress-text").textContent = `${done} of ${n}`;
    $("tally").replaceChildren(...grades.flatMap(([key]) => {
      const badge = document.createElement("b");
      badge.className = key;
      badge.textContent = key;
      return [badge, String(counts[key])];
    }));
    $("undo").disabled = !state.history.length;
    $("export").disabled = !done;
    $("name-button").textContent = voter || "Name";
    return done;
  }

  function say(text) { $("status").textContent = text; }

  // ---- What people do ----------------------------------------------------

  function vote(grade) {
    const i = current;
    if (i < 0) return;
    if (!voter) return askName();
    const truth = data.truth ? data.truth[i] : null;
    if (truth !== null && gradeOf(i)) return say("What this one is has been told; its first grade counts.");
    const id = data.ids[i], saw = Number(maySee(i) && details.some((detail) => detail.is_machine));
    const previous = state.votes[id] || null;
    const seconds = Math.min((performance.now() - shownSince) / 1000, 3600);
    if (truth === null) state.history.push([id, previous]);
    state.votes[id] = [grade, new Date().toISOString(), seconds.toFixed(1), saw];
    save();
    refreshCard(i);
    const done = refreshProgress();
    const told = truth === null ? "" : truth ? " It is known to be a lens." : " It is known not to be a lens.";
    const next = findUngraded(i);
    if (next < 0) {
      select(i);
      say(`Candidate ${i + 1}: ${gradeNames[grade]}.${told} All ${order.length} shown have a grade; export the votes.`);
    } else {
      say(`Candidate ${i + 1}: ${gradeNames[grade]}.${told} ${done} of ${n} graded. Now candidate ${next + 1}.`);
      if ($("filter").value === "none") { current = next; shownSince = performance.now(); refreshList(); } else select(next);
    }
  }

  function undo() {
    const last = state.history.pop();
    if (!last) return say("There is nothing to take back.");
    const [id, previous] = last, i = data.ids.indexOf(id);
    if (previous) state.votes[id] = previous; else delete state.votes[id];
    save();
    refreshProgress();
    if (i < 0) return;
    refreshCard(i);
    if (!keep[$("filter").value](i)) $("filter").value = "all";
    current = i;
    shownSince = performance.now();
    refreshList();
    say(`Took back the grade of candidate ${i + 1}; it has ${previous ? "grade " + gradeNames[previous[0]] : "no grade"} now.`);
  }

  function findUngraded(from) {
    const start = order.indexOf(from);
    for (let k = 1; k <= order.length; k++) {
      const i = order[(start + k + order.length) % order.length];
      if (i !== from && !gradeOf(i)) return i;
    }
    return -1;
  }

  function move(step) {
    if (!order.length) return;
    const place = order.indexOf(current);
    select(order[Math.max(0, Math.min(order.length - 1, place < 0 ? 0 : place + step))], { announce: true });
  }

  function countColumns() {
    return getComputedStyle($("list")).gridTemplateColumns.split(" ").length;
  }

  function goUngraded() {
    const next = findUngraded(current);
    if (next < 0) say(`All ${order.length} shown have a grade.`); else select(next, { announce: true });
  }

  function setView(next) {
    view = next;
    $("view").value = view.key;
    [...$("views").children].forEach((button, k) => button.setAttribute("aria-pressed", String(views[k] === view)));
    refreshThumbnails();
    refreshPicture();
  }

  function setBrightness(value) {
    brightness = Math.max(-10, Math.min(10, value));
    $("brightness").value = brightness;
    refreshThumbnails();
    refreshPicture();
  }

  function setZoom(value) {
    $("zoom").value = value;
    refreshPicture();
  }

  function askName() {
    $("name").value = voter;
    $("help-form").querySelector("button").textContent = voter ? "Continue" : "Start";
    $("help").showModal();
    $("name").focus();
  }

  function showScores(on) {
    scoresShown = on;
    for (const option of $("sort").options) {
      const detail = machine(option.value);
      option.disabled = Boolean(detail && detail.is_machine && !on);
    }
    if ($("sort").selectedOptions[0].disabled) $("sort").value = "page";
    $("minimum-label").hidden = !on || !machine("score");
    for (let i = 0; i < n; i++) refreshCard(i);
    refreshList();
  }

  const shortcuts = {
    z: undo, j: () => move(1), k: () => move(-1), g: goUngraded, "?": askName,
    v: () => setView(views[(views.indexOf(view) + 1) % views.length]),
    "+": () => setZoom(Number($("zoom").value) + 0.5), "=": () => setZoom(Number($("zoom").value) + 0.5),
    "-": () => setZoom(Number($("zoom").value) - 0.5),
    "[": () => setBrightness(brightness - 1), "]": () => setBrightness(brightness + 1),
  };
  grades.forEach(([key]) => { shortcuts[key.toLowerCase()] = () => vote(key); });
  views.slice(0, 9).forEach((item, k) => { shortcuts[String(k + 1)] = () => setView(item); });

  function onKey(event) {
    const target = event.target instanceof Element ? event.target : document.body;
    if ($("help").open || event.altKey || event.metaKey) return;
    if (event.ctrlKey) {
      if (event.key.toLowerCase() !== "z" || event.shiftKey || target.matches("input[type=search], input[type=number]")) return;
      event.preventDefault();
      return undo();
    }
    if (target.matches("select, input:not([type=checkbox])")) return;
    const moves = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: countColumns(), ArrowUp: -countColumns() };
    const ends = { Home: -n, End: n, PageDown: 4 * countColumns(), PageUp: -4 * countColumns() };
    let action = null;
    if (event.key in moves) action = () => move(moves[event.key]);
    else if (target === $("list") && event.key in ends) action = () => move(ends[event.key]);
    else if ($("keys").checked && !event.repeat) action = shortcuts[event.key.toLowerCase()];
    else if ($("keys").checked && "jk".includes(event.key.toLowerCase())) action = shortcuts[event.key.toLowerCase()];
    if (!action) return;
    event.preventDefault();
    action();
  }

  // ---- Set up ------------------------------------------------------------

  function addOptions(select, options) {
    for (const [value, text] of options) {
      const option = document.createElement("option");
      option.value = value;
      option.textContent = text;
      select.append(option);
    }
  }

  function refreshAll() {
    for (let i = 0; i < n; i++) refreshCard(i);
    refreshProgress();
    refreshList();
  }

  function start() {
    loadName();
    load();
    addOptions($("sort"), sorters);
    addOptions($("filter"), [["all", "All"], ["none", "Without a grade"], ["any", "With a grade"],
      ...grades.map(([key]) => [key, gradeNames[key]])]);
    addOptions($("flags"), [["any", "Any"], ["without", "None"], ["with", "Some"]]);
    addOptions($("view"), views.map((item) => [item.key, item.label]));
    for (const [key] of grades) {
      const button = document.createElement("button"), letter = document.createElement("b");
      button.type = "button";
      button.dataset.grade = key;
      button.setAttribute("aria-keyshortcuts", key.toLowerCase());
      letter.className = key;
      letter.textContent = key;
      letter.setAttribute("aria-hidden", "true");
      button.append(letter, gradeNames[key]);
      button.addEventListener("click", () => vote(key));
      $("grades").append(button);
      const dt = document.createElement("dt"), dd = document.createElement("dd");
      dt.className = key;
      dt.textContent = key;
      dd.textContent = gradeNames[key];
      $("help-grades").append(dt, dd);
    }
    views.forEach((item, k) => {
      const button = document.createElement("button"), canvas = document.createElement("canvas");
      button.type = "button";
      canvas.setAttribute("aria-hidden", "true");
      button.setAttribute("aria-pressed", String(item === view));
      button.setAttribute("aria-label", viewText(item));
      if (k < 9) button.setAttribute("aria-keyshortcuts", String(k + 1));
      button.append(canvas, item.label);
      button.addEventListener("click", () => setView(item));
      $("views").append(button);
    });
    for (let i = 0; i < n; i++) {
      cards.push(makeCard(i));
      observer.observe(cards[i].card);
    }
    $("list").addEventListener("click", (event) => {
      const card = event.target.closest(".card");
      if (card) select(Number(card.id.slice(4)));
    });
    for (const id of ["sort", "filter", "flags"]) $(id).addEventListener("change", refreshList);
    for (const id of ["search", "minimum"]) $(id).addEventListener("input", refreshList);
    $("view").addEventListener("change", () => setView(views.find((item) => item.key === $("view").value)));
    $("brightness").addEventListener("input", () => setBrightness(Number($("brightness").value)));
    $("thumbnails").addEventListener("input", () =>
      document.documentElement.style.setProperty("--thumb", `${$("thumbnails").value}px`));
    $("zoom").addEventListener("input", refreshPicture);
    $("smooth").addEventListener("change", refreshPicture);
    $("show-scores").checked = scoresShown;
    $("show-scores").addEventListener("change", () => showScores($("show-scores").checked));
    $("show-scores").parentElement.hidden = !details.some((detail) => detail.is_machine);
    $("undo").addEventListener("click", undo);
    $("export").addEventListener("click", exportVotes);
    $("import").addEventListener("click", () => $("import-file").click());
    $("import-file").addEventListener("change", async () => {
      const [file] = $("import-file").files;
      if (!file) return;
      $("help").close();
      try {
        importVotes(await file.text(), file.name);
        $("warning").hidden = true;
      } catch (error) {
        warn(`Nothing was imported from ${file.name}: ${error.message}.`);
      }
      $("import-file").value = "";
    });
    $("previous").addEventListener("click", () => move(-1));
    $("next").addEventListener("click", () => move(1));
    $("ungraded").addEventListener("click", goUngraded);
    $("name-button").addEventListener("click", askName);
    $("help-button").addEventListener("click", askName);
    $("copy").addEventListener("click", () => {
      const text = `${data.ra[current]} ${data.dec[current]}`;
      const done = navigator.clipboard ? navigator.clipboard.writeText(text) : Promise.reject(new Error());
      done.then(() => say(`Copied ${text}.`), () => say(`Position: ${text}`));
    });
    $("help-form").addEventListener("submit", () => {
      // What a spreadsheet would take for a formula, or break a line.
      const name = $("name").value.replace(/[\u0000-\u001f\u007f]+/g, " ").replace(/^[\s=+\-@]+/, "").trim();
      if (!name || name === voter) return;
      voter = name;
      load();
      save();
      refreshAll();
    });
    // A dialog gives the focus back to what had it before.
    $("help").addEventListener("close", () => $("list").focus());
    $("big").addEventListener("wheel", (event) => {
      event.preventDefault();
      setZoom(Number($("zoom").value) + (event.deltaY < 0 ? 0.5 : -0.5));
    }, { passive: false });
    document.addEventListener("keydown", onKey);
    // Another tab with this page.
    window.addEventListener("storage", (event) => {
      if (event.key !== storeKey()) return;
      load();
      refreshAll();
    });
    refreshProgress();
    showScores(scoresShown);
    const first = order.find((i) => !gradeOf(i));
    if (first !== undefined) select(first);
    if (voter) $("list").focus(); else askName();
  }

  start();
})();
