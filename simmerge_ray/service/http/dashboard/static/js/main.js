// The dashboard. The server renders what is there at first; from here on the JSON API says what is new.

import { $ } from "./dom.js";
import { get } from "./api.js";
import { Choose } from "./choose.js";
import { Decisions, Detail } from "./decisions.js";
import { HeatMap } from "./heatmap.js";
import { Live } from "./live.js";
import { Curve, showPolicy } from "./overview.js";

const roles = new Set(document.body.dataset.roles.split(" ").filter(Boolean));

const curve = new Curve();
const detail = new Detail(roles, () => live.now());
const decisions = new Decisions((id) => detail.open(id));
const live = new Live(async () => {
  const policy = await get("v1/policy");
  showPolicy(policy);
  await Promise.all([curve.refresh(policy.seq), decisions.refresh(policy.seq)]);
});
const choose = new Choose(roles, (id, open) => (open ? detail.open(id) : live.now()));
const heat = new HeatMap((left, right) => {
  if (!roles.has("decide")) return;
  choose.take(left, right);
  $("choose").scrollIntoView();
  $("left").focus({ preventScroll: true });
});

$("logout").addEventListener("click", async () => {
  await fetch("logout", { method: "POST" }).catch(() => null); // without an answer the cookie is still there: so is the page
  location.assign("./");
});

live.now();
choose.rank();
heat.load();
