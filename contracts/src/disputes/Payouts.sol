// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {Math} from "@openzeppelin/contracts/utils/math/Math.sol";
import {Terms} from "./DisputeTerms.sol";

/// @notice Where what was taken from a provider's stake goes; taken = burned + victim + challenger + winners * each.
struct Split {
    uint256 taken;
    uint256 burned;
    uint256 victim;
    uint256 challenger;
    uint256 each; // to each member on the winning side
}

/// @title The arithmetic of a verdict, in base units
/// @notice Pure. Of whatever is taken at least `burnPpm` is burned, rounded up, so nobody gains by being slashed, whichever of the other
/// parts are its own. Dust of divisions is burned, too.
library Payouts {
    uint256 private constant PPM = 1_000_000;

    /// @notice All that is locked goes: fees first, the victim up to its multiple, then challenger and panel by share.
    function slash(Terms memory t, uint256 locked, uint256 amount, uint256 winners)
        internal
        pure
        returns (Split memory s)
    {
        s.taken = locked;
        s.burned = Math.mulDiv(locked, t.burnPpm, PPM, Math.Rounding.Ceil);
        uint256 left = locked - s.burned;
        uint256 fees = Math.min(left, winners * t.panelFee);
        s.victim = Math.min(left - fees, amount * t.victimMultiple);
        left -= fees + s.victim;
        s.challenger = left * t.challengerPpm / PPM;
        _share(s, fees + left - s.challenger, winners);
    }

    /// @notice The panel gets its fees and the victim its amount, or what is left of the lock; as much again is burned, else a dispute with
    /// oneself were a way round unbonding.
    function restore(Terms memory t, uint256 locked, uint256 amount, uint256 winners)
        internal
        pure
        returns (Split memory s)
    {
        uint256 need = amount + winners * t.panelFee;
        s.taken = Math.min(locked, Math.ceilDiv(need * PPM, PPM - t.burnPpm));
        s.burned = Math.mulDiv(s.taken, t.burnPpm, PPM, Math.Rounding.Ceil);
        uint256 left = s.taken - s.burned;
        s.victim = Math.min(amount, left - Math.min(left, winners * t.panelFee));
        _share(s, left - s.victim, winners);
    }

    function _share(Split memory s, uint256 sum, uint256 winners) private pure {
        s.each = sum / winners;
        s.burned += sum - s.each * winners;
    }
}
