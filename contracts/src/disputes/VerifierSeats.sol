// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {ReentrancyGuardTransient} from "@openzeppelin/contracts/utils/ReentrancyGuardTransient.sol";
import {DisputeTerms} from "./DisputeTerms.sol";
import {IStakeRegistry} from "./IStakeRegistry.sol";
import {List, Places} from "./Places.sol";

/// @notice What one verifier has at stake for all its models.
struct Seat {
    uint96 locked; // base units of its registry stake that this contract holds
    uint32 models; // models that it is enrolled for
    uint32 panels; // unfinished disputes that it was drawn for
    bytes32 evidenceKey; // X25519 public key to which evidence is encrypted
}

/// @title Verifiers: who can be drawn for a panel, and the draw
/// @notice What holds, whatever anyone does:
/// - one seat weighs as much as any other and locks the same stake, so the draw is by stake;
/// - a draw costs at most `DRAW_TRIES_MAX` looks, however many seats there are;
/// - between a challenge and its draw no seat changes its place, so nobody steers a draw by joining or leaving;
/// - a model's list is never longer than the most members that it had at once: whoever leaves while a draw is pending leaves a hole, and
///   whoever joins next sits down in it. Joining and leaving again and again therefore dilutes no draw.
/// - a verifier can always leave, and its stake is free when its last panel has ended.
///
/// Why a hole that is sat in again is fair to the draw that is pending: its lease was issued before its challenge, so whoever joins later is
/// not seasoned for it, and a look that meets the newcomer passes on, as one that meets the hole does. For later draws every place weighs
/// the same.
abstract contract VerifierSeats is DisputeTerms, ReentrancyGuardTransient {
    using Places for List;

    /// @notice Looks at the list that one draw takes at most.
    uint256 public constant DRAW_TRIES_MAX = 128;

    uint8 private constant ROLE_VERIFIER = 4;

    struct Membership {
        address owner; // as it was at enrolment; registries never change it
        uint40 epoch; // of the enrolment; zero: not enrolled
        uint40 index; // in the model's list
    }

    struct Pool {
        uint64 active; // members, holes not counted
        uint64 pendingDraws; // disputes of the model that wait for their panel; while there are any, the list keeps its places
    }

    /// @notice Where stake lies.
    IStakeRegistry public immutable registry;

    mapping(bytes32 model => List) private _lists;
    mapping(bytes32 model => mapping(address operator => Membership)) private _memberships;
    mapping(bytes32 model => mapping(uint256 epoch => uint256)) private _joined; // present members by the epoch of their enrolment
    mapping(bytes32 model => Pool) private _pools;
    mapping(address operator => Seat) internal _seats;

    event Enrolled(address indexed operator, bytes32 indexed model, address owner, uint32 epoch);
    event EvidenceKeySet(address indexed operator, bytes32 evidenceKey);
    event Left(address indexed operator, bytes32 indexed model);
    /// @notice `locked` is the new value.
    event SeatChanged(address indexed operator, uint96 locked);

    /// @notice The caller is no registered verifier: it registers in StakeRegistry with ROLE_VERIFIER first.
    error NotVerifier(address operator);
    /// @notice The caller is enrolled for this model already.
    error AlreadyEnrolled(bytes32 model, address operator);
    /// @notice This operator is not enrolled for this model.
    error NotEnrolled(bytes32 model, address operator);
    /// @notice The evidence key is zero.
    error InvalidEvidenceKey();
    /// @notice The seat covers its fees: only one that does not can be evicted.
    error SeatCovered(address operator, uint96 locked);
    /// @notice The seat holds all that it should, or nothing to release.
    error SeatUnchanged(address operator);
    /// @notice The seat is still in use, by models or unfinished panels.
    error SeatInUse(address operator, uint32 models, uint32 panels);
    /// @notice There is no hole at this place of the list, or a draw is pending and places must not change.
    error NothingToCompact(bytes32 model, uint256 index);

    constructor(IStakeRegistry registry_) {
        registry = registry_;
    }

    // ------------------------------------------------------------------ joining and leaving

    /// @notice Enrols the caller for panels about a model. The first model locks the seat's stake; whole epochs from now it is seasoned.
    /// @param model Manifest digest; the caller must be able to run it.
    /// @param evidenceKey X25519 public key for evidence that has to go on chain; replaces the one before.
    function enrol(bytes32 model, bytes32 evidenceKey) external nonReentrant {
        (address owner, uint8 roles) = registry.identity(msg.sender);
        if (roles & ROLE_VERIFIER == 0) revert NotVerifier(msg.sender);
        if (_memberships[model][msg.sender].epoch != 0) revert AlreadyEnrolled(model, msg.sender);
        _setEvidenceKey(evidenceKey);
        uint40 epoch = uint40(block.timestamp / _epochSeconds);
        _memberships[model][msg.sender] = Membership(owner, epoch, uint40(_lists[model].join(msg.sender)));
        ++_joined[model][epoch];
        ++_pools[model].active;
        ++_seats[msg.sender].models;
        emit Enrolled(msg.sender, model, owner, uint32(epoch));
        if (_seats[msg.sender].locked < _seatStake) _fillSeat(msg.sender);
    }

    /// @notice Replaces the caller's evidence key.
    function setEvidenceKey(bytes32 evidenceKey) external {
        if (_seats[msg.sender].models == 0 && _seats[msg.sender].panels == 0) revert NotVerifier(msg.sender);
        _setEvidenceKey(evidenceKey);
    }

    /// @notice The caller is drawn for this model no more. Its stake is free once no model and no panel is left.
    function unenrol(bytes32 model) external nonReentrant {
        _remove(model, msg.sender);
        Seat storage seat_ = _seats[msg.sender];
        if (seat_.models == 0 && seat_.panels == 0 && seat_.locked != 0) _release(msg.sender);
    }

    /// @notice The caller locks again what no-show fees took from its seat.
    function topUpSeat() external nonReentrant {
        Seat storage seat_ = _seats[msg.sender];
        if (seat_.models == 0) revert NotVerifier(msg.sender);
        if (seat_.locked >= _seatStake) revert SeatUnchanged(msg.sender);
        _fillSeat(msg.sender);
    }

    /// @notice Removes a member whose seat does not cover one no-show fee; anyone may call it.
    function evict(bytes32 model, address operator) external nonReentrant {
        uint96 locked = _seats[operator].locked;
        if (locked >= _noShowFee) revert SeatCovered(operator, locked);
        _remove(model, operator);
    }

    /// @notice Frees the stake of a seat without models and panels; anyone may call it.
    function releaseSeat(address operator) external nonReentrant {
        Seat storage seat_ = _seats[operator];
        if (seat_.models != 0 || seat_.panels != 0) revert SeatInUse(operator, seat_.models, seat_.panels);
        if (seat_.locked == 0) revert SeatUnchanged(operator);
        _release(operator);
    }

    /// @notice Takes a hole that somebody left while a draw was pending out of the list; anyone may call it.
    function compact(bytes32 model, uint256 index) external {
        List storage list = _lists[model];
        if (index >= list.places.length || list.places[index] != address(0) || _pools[model].pendingDraws != 0) {
            revert NothingToCompact(model, index);
        }
        _moved(model, list.fill(index), index);
    }

    // ------------------------------------------------------------------ views

    /// @notice What an operator has at stake.
    function seat(address operator) external view returns (Seat memory) {
        return _seats[operator];
    }

    /// @notice The epoch in which an operator enrolled for a model; zero when it is not enrolled.
    function joinedEpoch(bytes32 model, address operator) external view returns (uint32) {
        return uint32(_memberships[model][operator].epoch);
    }

    /// @notice The operator at a place of a model's list; zero is a hole.
    function verifierAt(bytes32 model, uint256 index) external view returns (address) {
        return _lists[model].places[index];
    }

    /// @notice Length of a model's list, holes included.
    function verifierCount(bytes32 model) public view returns (uint256) {
        return _lists[model].places.length;
    }

    /// @notice Present members of a model that are seasoned for a lease issued at `issuedAt`.
    /// @dev Visits the epochs from then to now: at most `EPOCHS_MAX` for a lease that can still be challenged.
    function seasonedCount(bytes32 model, uint64 issuedAt) public view returns (uint256 count) {
        uint256 issued = issuedAt / _epochSeconds;
        if (issued <= _seasoningEpochs) return 0;
        count = _pools[model].active;
        uint256 last = block.timestamp / _epochSeconds;
        for (uint256 epoch = issued - _seasoningEpochs; epoch <= last; ++epoch) {
            count -= _joined[model][epoch];
        }
    }

    // ------------------------------------------------------------------ for Disputes

    /// From now on the model's list keeps its places, until `_drawEnded`.
    function _drawBegins(bytes32 model) internal {
        ++_pools[model].pendingDraws;
    }

    function _drawEnded(bytes32 model) internal {
        --_pools[model].pendingDraws;
    }

    /// @dev The five first eligible of a sequence fixed by the seed; `found` is less than five when `DRAW_TRIES_MAX` looks did not find them.
    /// @param barred Operators and owners that must not sit on this panel.
    function _drawPanel(bytes32 model, bytes32 seed, uint256 poolSize, uint64 issuedAt, address[8] memory barred)
        internal
        view
        returns (address[5] memory panel, uint256 found)
    {
        address[5] memory owners;
        for (uint256 i = 0; i < DRAW_TRIES_MAX && found < PANEL_SIZE; ++i) {
            address operator = _lists[model].places[uint256(keccak256(abi.encode(seed, i))) % poolSize];
            if (operator == address(0)) continue;
            Membership storage member = _memberships[model][operator];
            address owner = member.owner;
            if (member.epoch + _seasoningEpochs >= issuedAt / _epochSeconds) continue;
            if (_isBarred(operator, owner, barred) || _isSeated(operator, owner, panel, owners, found)) continue;
            if (!_covers(operator)) continue;
            (panel[found], owners[found]) = (operator, owner);
            ++found;
        }
    }

    /// Takes the no-show fee from a member's seat; the tokens come to this contract.
    function _takeNoShowFee(address operator) internal returns (uint96 fee) {
        Seat storage seat_ = _seats[operator];
        uint96 locked = seat_.locked;
        fee = _noShowFee < locked ? _noShowFee : locked;
        if (fee == 0) return 0;
        seat_.locked = locked - fee;
        emit SeatChanged(operator, locked - fee);
        registry.slash(operator, fee, address(this));
    }

    // ------------------------------------------------------------------ private

    /// Each panel that a member may still fail to serve is covered by its seat.
    function _covers(address operator) private view returns (bool) {
        Seat storage seat_ = _seats[operator];
        return seat_.locked >= uint256(_noShowFee) * (uint256(seat_.panels) + 1);
    }

    function _isBarred(address operator, address owner, address[8] memory barred) private pure returns (bool) {
        for (uint256 i = 0; i < barred.length; ++i) {
            if (operator == barred[i] || owner == barred[i]) return true;
        }
        return false;
    }

    function _isSeated(
        address operator,
        address owner,
        address[5] memory panel,
        address[5] memory owners,
        uint256 found
    ) private pure returns (bool) {
        for (uint256 i = 0; i < found; ++i) {
            if (operator == panel[i] || owner == owners[i]) return true;
        }
        return false;
    }

    function _setEvidenceKey(bytes32 evidenceKey) private {
        if (evidenceKey == 0) revert InvalidEvidenceKey();
        if (_seats[msg.sender].evidenceKey == evidenceKey) return;
        _seats[msg.sender].evidenceKey = evidenceKey;
        emit EvidenceKeySet(msg.sender, evidenceKey);
    }

    function _fillSeat(address operator) private {
        uint96 missing = _seatStake - _seats[operator].locked;
        _seats[operator].locked = _seatStake;
        emit SeatChanged(operator, _seatStake);
        registry.lock(operator, missing);
    }

    function _release(address operator) private {
        uint96 locked = _seats[operator].locked;
        _seats[operator].locked = 0;
        emit SeatChanged(operator, 0);
        registry.unlock(operator, locked);
    }

    function _remove(bytes32 model, address operator) private {
        Membership memory member = _memberships[model][operator];
        if (member.epoch == 0) revert NotEnrolled(model, operator);
        delete _memberships[model][operator];
        --_joined[model][member.epoch];
        --_pools[model].active;
        --_seats[operator].models;
        if (_pools[model].pendingDraws == 0) _moved(model, _lists[model].shrink(member.index), member.index);
        else _lists[model].vacate(member.index);
        emit Left(operator, model);
    }

    function _moved(bytes32 model, address operator, uint256 index) private {
        if (operator != address(0)) _memberships[model][operator].index = uint40(index);
    }
}
