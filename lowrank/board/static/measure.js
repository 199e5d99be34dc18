// Measuring and exporting: the forms send themselves (common.js), the lists follow.
import { $$, calmly, listen, refresh } from "./common.js";

const draw = calmly(() => Promise.all($$("[data-part]").map(refresh)), 700);
listen(() => "/api/live", { changed: draw });
setInterval(() => { if (!document.hidden) draw(); }, 2500); // progress of what runs, which is no change of the lists
